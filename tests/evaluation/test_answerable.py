"""Whether scores separate questions that memory can answer from others."""

import pytest
import torch
from peft import get_peft_model
from small_runs import write_folder
from tiny import tiny, tiny_tokenizer
from torchmetrics.functional.classification import binary_auroc

from evaluation.config import RunConfig
from evaluation.run import Answerer
from evaluation.scores import placements
from evaluation.tasks import Answerable
from evaluation.tasks.answerable import fitted
from gradmem_adapter import GradMemConfig
from gradmem_adapter.read.likelihood import scores


def test_placements_give_the_area_under_the_curve():
    drawn = torch.rand(40, dtype=torch.float64).mul(10).round() / 10  # with ties
    kind = torch.arange(40) < 15
    found = placements(drawn[kind], drawn[~kind]).mean()
    assert found == pytest.approx(float(binary_auroc(drawn, kind.long())), abs=1e-6)


def test_the_fit_finds_the_parameters_of_the_data():
    likelihoods = -2 * torch.rand(4000, dtype=torch.float64)
    kind = (torch.rand(4000) < (3 * likelihoods + 2).sigmoid()).double()
    for calibration in (None, (3.0, 1.0)):
        config = GradMemConfig(score_calibration=calibration)
        assert fitted(scores(likelihoods, calibration), kind, config) == pytest.approx([3, 2], abs=0.4)


def test_the_fit_with_scores_from_the_refusal():
    """It fits the log-odds of an answer."""
    refused = -3 * torch.rand(4000, dtype=torch.float64)
    odds = scores(refused, None, 2).logit()
    kind = (torch.rand(4000) < (0.5 * odds - 1).sigmoid()).double()
    for calibration in (None, (2.0, 1.0)):
        config = GradMemConfig(refusal="no idea", score_calibration=calibration)
        assert fitted(scores(refused, calibration, 2), kind, config) == pytest.approx([0.5, -1], abs=0.2)


def test_the_task_measures_the_area_and_a_calibration(tmp_path):
    folder = write_folder(tmp_path)
    model = get_peft_model(tiny(), GradMemConfig(num_memory_tokens=3, write_lr=0.3, query_format="chat")).eval()
    task = {"name": "answerable", "source": str(folder / "short")}
    config = RunConfig.of({"backbone": "none", "tasks": [task]})
    answerer = Answerer(model, tiny_tokenizer(), config, steps=1)
    found = config.tasks[0].measure(answerer, "test", limit=4)
    assert len(found.values["auc"]) == 8
    assert len(found.answers) == 16
    right, wrong = ([a["score"] for a in found.answers if a["answerable"] == kind] for kind in (1, 0))
    area = binary_auroc(torch.tensor(right + wrong), torch.tensor([1] * len(right) + [0] * len(wrong)))
    assert float(found.values["auc"].mean()) == pytest.approx(float(area), abs=1e-6)
    assert len(found.facts["score_calibration"]) == 2
    again = config.tasks[0].measure(answerer, "test", limit=4)
    assert torch.equal(again.values["auc"], found.values["auc"])
    assert (
        len(config.tasks[0].measure(answerer, "test", limit=10_000).answers) >= 16
    )  # an upper limit, which need not be reached
    with pytest.raises(ValueError, match=r"only one of the split 'test' of .*--limit"):
        config.tasks[0].measure(answerer, "test", limit=1)


def test_methods_without_states_are_refused(tmp_path):
    answerer = Answerer(tiny(), tiny_tokenizer(), RunConfig.of({
        "backbone": "none", "method": {"name": "full_context"}, "tasks": [{"name": "answerable", "source": "x"}],
    }), steps=0)  # fmt: skip
    with pytest.raises(TypeError, match="needs the method gradmem"):
        Answerable(source="x").measure(answerer, "test")
