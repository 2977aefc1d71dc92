"""The adapters that ship for questions: small, and their cards say what the result files say."""

from pathlib import Path

import pytest

from evaluation.config import Evaluation
from evaluation.results import RESULTS, load_records
from evaluation.run import evaluate
from evaluation.tasks import Babi

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
DATA = Path(__file__).parents[1] / "data"
SEVERAL = [(0, 1), (1, 1), (2, 1), (4, 1), (2, 2), (2, 4), (2, 8)]
TASKS = {"babi 1", "babi 2", "babi 4", "babi 5"}
each = pytest.mark.parametrize("checkpoint", ["smollm2-135m-qa", "smollm2-135m-qa-128", "smollm2-135m-babi"])


@each
def test_the_checkpoint_is_small(checkpoint):
    assert (CHECKPOINTS / checkpoint / "adapter_model.safetensors").stat().st_size < 10_000_000


@pytest.mark.parametrize(
    ("checkpoint", "results", "datasets", "columns"),
    [
        ("smollm2-135m-qa", "general", {"squad", "fairytaleqa", *TASKS}, SEVERAL),
        ("smollm2-135m-qa-128", "general", {"squad", "fairytaleqa", *TASKS}, SEVERAL),
        ("smollm2-135m-babi", "answers", TASKS, [(0, 1), (1, 1), (2, 1)]),
    ],
)
def test_the_card_agrees_with_the_results(checkpoint, results, datasets, columns):
    """A row for each test set, a column for write steps and contexts: exact match, and F1 where it differs."""
    lines = (CHECKPOINTS / checkpoint / "README.md").read_text(encoding="utf-8").lower().splitlines()
    mine = {
        (r.dataset, r.write_steps, r.states): r.metrics
        for r in load_records(RESULTS / f"{results}.jsonl")
        if r.facts.get("checkpoint") == checkpoint and not {"unanswerable", "alone"} & set(r.settings)
    }
    assert {dataset for dataset, _, _ in mine} == datasets
    assert {(steps, states) for _, steps, states in mine} == set(columns)
    for dataset in datasets:
        cells = [score(mine.get((dataset, *column))) for column in columns]
        row = "|".join(["", f" {dataset} ", *(f" {cell} " if cell else " " for cell in cells), ""])
        assert any(line.startswith(row) for line in lines), row


def score(metrics):
    """In %; empty where nothing was measured."""
    if metrics is None:
        return ""
    return " / ".join(dict.fromkeys(f"{100 * metrics[name]:.1f}" for name in ("exact_match", "f1")))


@pytest.mark.smollm
@each
def test_the_checkpoint_answers_stories(checkpoint):
    """Of six questions of bAbI 1, the bAbI adapter answers all, and a general one at least five."""
    evaluation = Evaluation(tasks=(Babi(source=str(DATA), number=1),), write_steps=(1,))
    records = evaluate(CHECKPOINTS / checkpoint, device="cpu", evaluation=evaluation)
    (found,) = [record.metrics["exact_match"] for record in records]
    assert found >= (1 if checkpoint == "smollm2-135m-babi" else 5 / 6)
    assert records[0].facts["bytes_per_context"] == 4 * records[0].memory_tokens * 576
