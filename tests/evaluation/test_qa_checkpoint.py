"""The adapters that ship for questions."""

import json
from pathlib import Path

import pytest

from gradmem_adapter.cli.ask import CHECKPOINT
from gradmem_adapter.recipes import load_recipe
from gradmem_adapter.tasks.qa_recipe import QARecipe
from gradmem_adapter.tasks.qa_results import TASK, QARecord
from gradmem_adapter.tasks.records import load_records

ROOT = Path(__file__).parent.parent
BABI = CHECKPOINT.with_name("smollm2-135m-babi")


@pytest.mark.parametrize(
    ("checkpoint", "example"), [(CHECKPOINT, "qa_passages_longer"), (BABI, "qa_babi_all_questions")]
)
def test_was_made_by_the_example(checkpoint, example):
    made = json.loads((checkpoint / "recipe.json").read_text(encoding="utf-8"))
    assert QARecipe.of(made) == load_recipe(ROOT / "examples" / f"{example}.yaml")


@pytest.mark.parametrize("checkpoint", [CHECKPOINT, BABI])
def test_is_small(checkpoint):
    assert (checkpoint / "adapter_model.safetensors").stat().st_size < 10_000_000


TASKS = {"babi 1", "babi 2", "babi 4", "babi 5"}


@pytest.mark.parametrize(
    ("checkpoint", "memory_tokens", "datasets", "columns"),
    [
        (CHECKPOINT, 32, TASKS | {"fairytaleqa"}, [(0, 1), (1, 1), (2, 1), (0, 2), (0, 4)]),
        (BABI, 16, TASKS, [(0, 1), (1, 1), (2, 1)]),
    ],
)
def test_its_card_says_what_the_results_say(checkpoint, memory_tokens, datasets, columns):
    """A row for each test set, a column for write steps and contexts: exact match, and F1 where it is another."""
    lines = (checkpoint / "README.md").read_text(encoding="utf-8").lower().splitlines()
    records = load_records(ROOT / "results" / "answers.json", TASK, QARecord)
    mine = {
        (r.dataset, r.write_steps, r.states): r
        for r in records
        if r.method == "gradmem" and r.memory_tokens == memory_tokens
    }
    assert {dataset for dataset, _, _ in mine} == datasets
    assert {(steps, states) for _, steps, states in mine} == set(columns)
    for dataset in datasets:
        cells = [score(mine.get((dataset, *column))) for column in columns]
        row = f"| {dataset} | {' | '.join(cells)} |"
        assert any(line.startswith(row) for line in lines), row


def score(record):
    """In %; empty where nothing was measured."""
    if record is None:
        return ""
    scores = dict.fromkeys(f"{100 * value:.1f}" for value in (record.exact_match, record.f1))
    return " / ".join(scores)
