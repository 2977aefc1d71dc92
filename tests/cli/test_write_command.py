"""`gradmem write`: files in, a file of states out."""

import json

import pytest
import torch
from commands import invoke
from tiny import tiny_text

from gradmem_adapter import GradMemModel, GradMemPipeline, MemoryState, load_checkpoint


def files_of(tmp_path, *texts):
    files = [tmp_path / f"{i}[b].txt" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def test_files_are_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [tiny_text(count, seed=count) for count in (7, 30, 12)]
    files = [file.name for file in files_of(tmp_path, *texts)]
    arguments = ("--checkpoint", "checkpoint", "--device", "cpu", "--max-tokens", 30)
    result = invoke("write", *files, "--output", "states.safetensors", *arguments)
    assert result.exit_code == 0, result.output
    states = MemoryState.load("states.safetensors")
    expected = GradMemPipeline(*load_checkpoint(checkpoint)).write(texts)
    torch.testing.assert_close(states.vectors, expected.vectors, rtol=1e-4, atol=1e-6)
    assert states.context_tokens.tolist() == [7, 30, 12]
    rows = [line.split() for line in result.stdout.splitlines() if ".txt" in line]
    losses = [f"{loss:.4f}" for loss in states.write_losses[:, -1].tolist()]
    assert [row[1::2] for row in rows] == [
        [name, tokens, str(3 * 32 * 4), loss]
        for name, tokens, loss in zip(files, ("7", "30", "12"), losses, strict=True)
    ]
    assert ("bytes" in result.stdout, "nbytes" in result.stdout) == (True, False)
    assert "WRITE" not in result.stderr  # no terminal, no progress bar
    steps = invoke("write", files[0], "--output", "steps.safetensors", "--steps", 5, *arguments)
    assert steps.exit_code == 0, steps.output
    assert MemoryState.load("steps.safetensors").write_losses.shape == (1, 6)


def test_files_are_written_by_self_study(checkpoint, tmp_path):
    (file,) = files_of(tmp_path, tiny_text(9, seed=1))
    arguments = ("--checkpoint", checkpoint, "--output", tmp_path / "states", "--device", "cpu", "--steps", 2)
    result = invoke("write", file, *arguments, "--objective", "self_study")
    assert result.exit_code == 0, result.output
    expected = GradMemPipeline(*load_checkpoint(checkpoint)).write(
        tiny_text(9, seed=1), objective="self_study", steps=2
    )
    assert MemoryState.load(tmp_path / "states").equal(expected)


def test_a_directory_and_json_lines_are_written_with_json_output(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    files_of(tmp_path / "notes", "w1 w2", "w3 w4 w5")
    (tmp_path / "rows.jsonl").write_text('{"body": "w6"}\n')
    arguments = ("--checkpoint", "checkpoint", "--device", "cpu", "--text-field", "body", "--json")
    result = invoke("write", "notes", "rows.jsonl", "--output", "states", *arguments)
    assert result.exit_code == 0, result.output
    printed, states = json.loads(result.stdout), MemoryState.load("states")
    assert [row["source"] for row in printed["states"]] == ["notes/0[b].txt", "notes/1[b].txt", "rows.jsonl:1"]
    assert [row["tokens"] for row in printed["states"]] == states.context_tokens.tolist() == [2, 3, 1]
    assert [row["write_loss"] for row in printed["states"]] == states.write_losses[:, -1].tolist()


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (" \n", [], "1[b].txt is empty"),
        (tiny_text(200), [], "Context 1 has 200 tokens, but at most 93"),
        ("w1", ["--steps", "-1"], "Invalid value for '--steps'"),
        ("w1", ["--objective", "recite"], "Invalid value for '--objective'"),
        ("w1", ["--max-tokens", "0"], "Invalid value for '--max-tokens'"),
        ("w1", ["--output", "none/states"], "There is no directory 'none'"),
        ("w1", ["--output", "."], "is a directory"),
        ("w1", ["--output", "1[b].txt", "--force"], "is one of the inputs"),
        ("w1", ["missing"], "missing: No such file"),
        ("w1", ["--checkpoint", "backbone"], "adapter_config.json"),
    ],
)
def test_invalid_texts_and_arguments_are_refused(checkpoint, tmp_path, monkeypatch, text, arguments, message):
    monkeypatch.chdir(tmp_path)
    files = files_of(tmp_path, "w1 w2", text)
    usual = ["--checkpoint", checkpoint, "--output", "states.safetensors", "--device", "cpu"]
    result = invoke("write", *files, *usual, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "states.safetensors").exists()


def test_files_that_are_not_text_are_refused(checkpoint, tmp_path):
    (file,) = files_of(tmp_path, "w1")
    file.write_bytes(b"\xff\xfe")
    result = invoke("write", file, "--checkpoint", checkpoint, "--output", tmp_path / "states")
    assert result.exit_code == 2
    assert "is not a text in UTF-8" in " ".join(result.stderr.split())


def test_a_text_that_runs_out_of_memory_is_named(checkpoint, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(GradMemModel, "_write", fail)
    arguments = ("--checkpoint", checkpoint, "--output", tmp_path / "states", "--device", "cpu")
    result = invoke("write", *files_of(tmp_path, "w1 w2"), *arguments)
    assert result.exit_code == 2
    assert "Context 0 with 2 tokens does not fit" in " ".join(result.stderr.split())
