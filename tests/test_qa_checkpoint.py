"""The adapter that ships for questions, and the demo that uses it."""

import io
import json
from pathlib import Path

import pytest
from peft import get_peft_model
from rich.console import Console
from tiny import tiny, tiny_text, tiny_tokenizer
from typer.testing import CliRunner

from gradmem_adapter import GradMemConfig, save_checkpoint
from gradmem_adapter.ask_demo import run_ask_demo
from gradmem_adapter.asking import CHECKPOINT
from gradmem_adapter.cli import app
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


@pytest.mark.smollm
def test_answers_from_memory():
    result = run_ask_demo(CHECKPOINT, console=Console(file=io.StringIO()))
    right = [answer == target for answer, target in zip(result.from_memory, result.targets, strict=True)]
    assert all(right), result.from_memory
    assert (result.context_tokens, result.memory_tokens) == (67, 32)
    assert result.kv_cache_bytes == 67 * 30 * 2 * 3 * 64 * 4
    assert result.state_bytes < result.kv_cache_bytes / 41


@pytest.fixture
def checkpoint(tmp_path):
    backbone = tiny(max_position_embeddings=256)
    backbone.save_pretrained(tmp_path / "backbone")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    backbone.name_or_path = str(tmp_path / "backbone")
    model = get_peft_model(backbone, GradMemConfig(num_memory_tokens=4, query_format="chat"))
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_demo_asks_after_it_has_recited(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(tiny_text(48), encoding="utf-8")
    command = ["demo", "--ask", "--checkpoint", checkpoint, "--backbone", tmp_path / "backbone", "--steps", "1"]
    result = CliRunner().invoke(app, [*map(str, command), "--text", str(tmp_path / "text.txt")])
    *_, asked = result.output.strip().splitlines()
    assert "demo: {" in result.output
    figures = json.loads(asked.removeprefix("ask: "))
    assert len(figures["from_memory"]) == len(figures["from_text"]) == len(figures["targets"]) == 3
    assert figures["memory_tokens"] == 4


def test_ask_is_for_recite():
    result = CliRunner().invoke(app, ["demo", "--task", "kv", "--ask"])
    assert result.exit_code == 2
    assert "--ask belongs to the task recite" in " ".join(result.stderr.split())
