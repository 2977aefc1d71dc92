"""The examples run: on a tiny random model, and on the adapter that ships."""

import json
import re

import pytest
from tiny import tiny_text

from gradmem_adapter import GradMemPipeline, load_checkpoint
from gradmem_adapter.store import MemoryStore


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
        "Who kept the princess? a giant",
        "What did the princess give Hans? a silver ring",
        "Who wrote Hamlet? not in memory",
    ]


def test_train_on_your_rows_and_resume(run, checkpoint, tmp_path):
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


@pytest.mark.slow
def test_ray(run, checkpoint, tmp_path):
    pytest.importorskip("ray")
    texts = {f"row {i}": tiny_text(10 + i, seed=i) for i in range(40)}
    rows = [json.dumps({"source": source, "text": text}) for source, text in texts.items()]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:30]))
    arguments = ("ray_write.py", tmp_path / "rows.jsonl", "--store", tmp_path / "memory", "--checkpoint", checkpoint)
    options = ("--workers", 2, "--segment-tokens", 30)
    assert "30 sources in 39 segments" in run(*arguments, *options)
    store = MemoryStore(tmp_path / "memory")
    before = {entry.key: entry.written for entry in store.entries()}
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    assert "40 sources" in run(*arguments, *options)
    after = {entry.key: entry for entry in store.entries()}
    assert all(after[key].written == written for key, written in before.items())
    assert all(entry.text == texts[entry.source][entry.start : entry.end] for entry in after.values())
    pipeline = GradMemPipeline(*load_checkpoint(checkpoint))
    assert store.add(pipeline, [entry.text for entry in after.values()]) == list(after)
    assert store.verify().ok
