"""A new task or method is a class in one file and a line in a registry; everything else then knows it."""

import pytest
import torch
from small_runs import qa_fields, write_folder
from toys import Echo, LastToken

from evaluation.config import RunConfig
from evaluation.methods import METHODS
from evaluation.plots import style
from evaluation.run import evaluate
from evaluation.tables import markdown, results_table
from evaluation.tasks import TASKS
from evaluation.train import train


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(TASKS, Echo.name, Echo)
    monkeypatch.setitem(METHODS, LastToken.name, LastToken)


def test_a_new_task_and_method_are_trained_measured_and_shown(tmp_path):
    fields = qa_fields(write_folder(tmp_path), {"name": "last_token"})
    fields["tasks"] = [{"name": "echo", "words": 5}, {"name": "passages", "source": str(tmp_path / "short")}]
    checkpoint = train(RunConfig.of(fields), tmp_path / "run", torch.device("cpu"))
    records = evaluate(checkpoint, device=torch.device("cpu"))
    assert [record.dataset for record in records] == ["echoes", "short"]
    assert set(records[0].metrics) == {"heard"}
    assert "| echoes | the last token |" in markdown(results_table(records))
    assert style("last_token") not in [style(name) for name in METHODS if name != "last_token"]


def test_gradmem_can_be_trained_on_a_new_task(tmp_path):
    fields = qa_fields(write_folder(tmp_path), tasks=[{"name": "echo"}])
    fields["training"] |= {"max_steps": 2}
    (record,) = evaluate(train(RunConfig.of(fields), tmp_path / "run", torch.device("cpu")), device="cpu",
                         evaluation=RunConfig.of(fields | {"evaluation": {"write_steps": [1]}}).evaluation)  # fmt: skip
    assert set(record.metrics) == {"heard"}
