"""What commands print when several processes run them together."""

from pathlib import Path

import pytest
from accelerate import PartialState
from commands import invoke

from evaluation.cli import app

RECIPE = Path(__file__).parents[2] / "evaluation" / "recipes" / "kv_16_pairs.yaml"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("made", ["made/by the run", None])
@pytest.mark.parametrize(
    ("function", "command", "then"),
    [
        ("evaluation.cli.train_run", ["train", RECIPE], "Measure it: python -m evaluation run"),
        (
            "evaluation.questions.cli.train_writer",
            ["questions", "train", "story=x"],
            "Let it write: python -m evaluation questions write",
        ),
    ],
)
def test_the_end_of_a_run_is_announced_once(monkeypatch, function, command, then, made, rank):
    monkeypatch.setattr(PartialState(cpu=True), "process_index", rank)
    monkeypatch.setattr(function, lambda *_: made and Path(made))
    result = invoke(*command, "--output", "run", "--device", "cpu", app=app)
    told = f"Saved: {made}. {then} {made}\n" if made else "Interrupted; the same command continues from run.\n"
    assert (result.stdout, result.exit_code) == ("" if rank else told, 0 if made else 130)
