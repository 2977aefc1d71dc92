"""The weights that ship for key-value retrieval answer as the result file says."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from evaluation.cli import app
from evaluation.key_values import as_rows, sample_pairs
from evaluation.models import load_model
from evaluation.results import RESULTS, load_records
from evaluation.run import Answerer
from evaluation.tasks import KVRetrieval
from gradmem_adapter import GradMemPipeline, load_checkpoint

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "kv-retrieval"


@pytest.fixture(scope="module")
def loaded():
    return load_model(CHECKPOINT)


def exact_match(loaded, pairs, steps, contexts):
    task = KVRetrieval(pairs=pairs, contexts=contexts, seed=123)
    return task.measure(Answerer(*loaded, steps), "test").values["exact_match"].mean().item()


@pytest.mark.parametrize(("pairs", "steps"), [(4, 1), (16, 1), (16, 5), (32, 2), (32, 30), (64, 5), (96, 5)])
def test_scores_agree_with_the_results(loaded, pairs, steps):
    """Within three standard deviations of this smaller measurement, whose queries are not independent."""
    (recorded,) = (
        record.metrics["exact_match"]
        for record in load_records(RESULTS / "kv_retrieval.jsonl")
        if record.facts.get("checkpoint") == "kv-retrieval"
        and (record.settings["pairs"], record.write_steps) == (pairs, steps)
    )
    contexts = 32 if steps <= 5 else 8
    deviation = (max(recorded * (1 - recorded), 0.01) / contexts) ** 0.5
    assert exact_match(loaded, pairs, steps, contexts) == pytest.approx(recorded, abs=3 * deviation)


@pytest.mark.parametrize("steps", [6, 9])
def test_numbers_of_steps_that_training_did_not_draw_also_work(loaded, steps):
    """With separate rates for each of the last steps, six steps scored 83 % where five scored 97."""
    assert exact_match(loaded, 96, steps, contexts=8) > 0.95


def test_answers_equal_the_choices_of_forward(loaded):
    model, *_ = loaded
    batch = sample_pairs(8, 16, 64, generator=torch.Generator().manual_seed(123))
    with torch.no_grad():
        logits = model(**batch, write_steps=2).logits
    right = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:])[:, -4:-2].all(1)  # the value, then `!|`
    task = KVRetrieval(pairs=64, contexts=8, seed=123)
    found = task.measure(Answerer(*loaded, 2), "test").values["exact_match"]
    assert found.bool().tolist() == right.tolist()
    assert 0 < found.sum() < len(found), "there is nothing to tell apart"


def test_compiled_layers_retrieve_the_same():
    pipeline = GradMemPipeline(*load_checkpoint(CHECKPOINT))
    rows = as_rows(sample_pairs(4, 32, 64, generator=torch.Generator().manual_seed(0)))
    contexts = [row["context"] for row in rows]
    plain, fast = (pipeline.write(contexts, steps=3, compile=compile) for compile in (False, True))
    assert ((fast.vectors - plain.vectors).norm() / plain.vectors.norm()).item() < 1e-5
    queries, index = [query for row in rows for query in row["queries"]], [i for i in range(4) for _ in range(32)]
    answers = [
        pipeline.generate(queries, memory=state, context_index=index, max_new_tokens=4, do_sample=False)
        for state in (plain, fast)
    ]
    assert answers[0] == answers[1]


def test_the_command_records_each_setting_once(tmp_path):
    results = tmp_path / "results.jsonl"
    command = ["run", str(CHECKPOINT), "--pairs", "4,8", "--steps", "1,2", "--contexts", "4", "--results", str(results)]
    for _ in range(2):
        result = CliRunner().invoke(app, [*command, "--device", "cpu"])
        assert result.exit_code == 0, result.output
        assert len(load_records(results)) == 4, "a measurement made again takes the place of the old one"
    assert "| pairs | 8 | GradMem | 2 |" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "1"], "--contexts is the number of contexts for each of --pairs"),
        (["--pairs", "4,x"], "--pairs must be integers"),
        (["--pairs", "0"], "pairs"),
        (["--steps", "-1"], "must not be negative"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--pairs", "200"], "tokens, but at most"),
        (["--only", "babi 2"], "no data set babi 2; there are pairs"),
        (["--task", "{name: riddles}"], "must be one of answerable, babi"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    result = CliRunner().invoke(app, ["run", str(CHECKPOINT), "--device", "cpu", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_directory_without_a_model_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["run", str(tmp_path)])
    assert result.exit_code == 2
    assert "There is no model trained by a recipe in" in " ".join(result.stderr.split())
