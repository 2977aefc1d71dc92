"""The examples run: on a tiny random model, and on the adapter that ships."""

import json
import re

import pytest
from tiny import tiny_text

from gradmem_adapter import load_checkpoint


def test_quickstart(run, checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(tiny_text(30), encoding="utf-8")
    output = run("quickstart.py", "w1 w2", "--text", tmp_path / "text.txt", "--checkpoint", checkpoint)
    first, answer = output.splitlines()
    assert re.fullmatch(r"30 tokens in 3 vectors, [\d,]+ bytes", first)
    assert answer.startswith("w1 w2 ")


@pytest.mark.smollm
def test_quickstart_on_smollm(run):
    answers = run("quickstart.py").splitlines()[1:]
    assert answers == [
        "Where did Hans live? at the edge of a dark forest",
        "What lay in the chest? a red cloak",
        "What did the princess give Hans? a silver ring",
    ]


def test_train_on_your_rows_and_go_on(run, checkpoint, tmp_path):
    rows = [
        {"context": tiny_text(12, seed=i), "queries": ["w1", "w2"], "targets": [tiny_text(2, i), tiny_text(1, i)]}
        for i in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    command = (
        "train_on_your_rows.py",
        tmp_path / "rows.jsonl",
        "--output",
        tmp_path / "run",
        "--checkpoint",
        checkpoint,
    )
    for steps in (2, 4):
        output = run(*command, "--steps", steps)
        assert re.search(r"exact match [\d.]+%, F1 [\d.]+% on 1 rows kept apart", output)
        assert (tmp_path / f"run/steps/checkpoint-{steps}").is_dir()
    model, _ = load_checkpoint(tmp_path / "run/checkpoint")
    assert model.fingerprint() != load_checkpoint(checkpoint)[0].fingerprint()
