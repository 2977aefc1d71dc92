"""`gradmem write --store`: any number of texts of any length, each written once."""

import json
import re

import pytest
import torch
from commands import invoke
from tiny import tiny_text

from gradmem_adapter import GradMemModel, GradMemPipeline, load_checkpoint
from gradmem_adapter.store import MemoryStore


@pytest.fixture(autouse=True)
def _texts(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "long.txt").write_text(tiny_text(50))
    (tmp_path / "notes" / "short.txt").write_text("w1 w2 w3\n")
    rows = [{"text": tiny_text(9, seed=i), "id": f"row {i}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(*arguments, store="memory"):
    options = ("--checkpoint", "checkpoint", "--device", "cpu", "--segment-tokens", 20)
    return invoke("write", *arguments, "--store", store, *options)


def figures(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_files_and_rows_are_written_once_in_segments(checkpoint):
    first = figures(write("notes", "rows.jsonl", "--source-field", "id", "--json"))
    assert (first["documents"], first["segments"], first["written"], first["tokens"]) == (5, 7, 7, 82)
    store = MemoryStore("memory")
    entries = list(store.entries())
    assert [entry.source for entry in entries] == ["notes/long.txt"] * 3 + [
        "notes/short.txt",
        "row 0",
        "row 1",
        "row 2",
    ]
    long = tiny_text(50)
    assert all(entry.text == long[entry.start : entry.end] for entry in entries[:3])
    pipeline = GradMemPipeline(*load_checkpoint(checkpoint))
    expected = pipeline.write_many([entry.text for entry in entries])
    stored = store.get([entry.key for entry in entries], pipeline.model.fingerprint())
    torch.testing.assert_close(stored.vectors, expected.vectors, rtol=0.1, atol=0.02)  # stored in fewer bits
    again = figures(write("notes", "rows.jsonl", "--source-field", "id", "--json"))
    assert again == first | {"written": 0}
    (checkpoint.parent / "notes" / "new.txt").write_text("w9 w8")
    more = write("notes")
    assert more.exit_code == 0
    assert "documents: 3, tokens: 57, segments: 5, of which written now: 1" in more.stdout


def test_texts_can_be_left_out_of_the_store(checkpoint):
    assert write("notes", "--no-text").exit_code == 0
    assert {entry.text for entry in MemoryStore("memory").entries()} == {None}


def test_a_store_inside_the_written_directory_is_skipped():
    first = figures(write(".", "--json", store="notes/memory"))
    assert figures(write(".", "--json", store="notes/memory"))["segments"] == first["segments"]


def test_unreadable_texts_are_named_and_the_others_written(tmp_path, monkeypatch):
    add = MemoryStore.add

    def diverging(store, pipeline, texts, **rest):
        if any(text == tiny_text(9, seed=1) for text in texts):
            raise ValueError("WRITE diverged.")
        return add(store, pipeline, texts, **rest)

    monkeypatch.setattr(MemoryStore, "add", diverging)
    (tmp_path / "notes" / "latin.txt").write_bytes(b"w1 \xe4")
    (tmp_path / "notes" / "picture").write_bytes(bytes(99))
    result = write("missing", "notes", "rows.jsonl", "--json")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert [line.split(":")[1] for line in lines] == [
        " missing",
        " notes/latin.txt is not a text in UTF-8",
        " rows.jsonl",
    ]
    assert lines[2] == f"gradmem write: rows.jsonl:2, characters 0 to {len(tiny_text(9, seed=1))}: WRITE diverged."
    printed = json.loads(result.stdout)
    assert [f"gradmem write: {line}" for line in printed["refused"]] == lines
    assert printed["passed_over"] == ["notes/picture"]
    assert (len(MemoryStore("memory")), printed["written"]) == (6, 6)


def test_only_the_first_of_many_faults_are_printed(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"txt": "w1"}\n' * 30)
    result = write("bad.jsonl", "--json")
    assert len(json.loads(result.stdout)["refused"]) == 30
    lines = result.stderr.splitlines()
    assert len(lines) == 21
    assert lines[-1].startswith("gradmem write: 10 more ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["notes"], "either --output FILE or --store DIR"),
        (["notes", "--store", "memory", "--output", "x"], "either --output FILE or --store DIR"),
        (["notes", "--store", "notes"], "notes holds other files and is not a memory store"),
        (["notes", "--store", "rows.jsonl"], "is a file"),
        (["notes", "--store", "/proc/memory"], "/proc"),
        (["empty", "--store", "memory"], "There is no text in empty"),
        (["notes", "--store", "memory", "--segment-tokens", "999"], "at most 93 tokens"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    result = invoke("write", "--checkpoint", "checkpoint", "--device", "cpu", "--segment-tokens", "20", *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "memory").exists()


def test_a_damaged_index_is_found_before_any_work(tmp_path, monkeypatch):
    assert write("notes").exit_code == 0
    (tmp_path / "memory" / "index.sqlite").write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 99)
    monkeypatch.setattr("gradmem_adapter.cli.write.open_pipeline", lambda *_, **__: pytest.fail("work was done"))
    result = write("rows.jsonl")
    assert result.exit_code == 2
    assert "index.sqlite' is damaged" in result.stderr


def test_ctrl_c_keeps_what_is_written_and_says_so(checkpoint, monkeypatch):
    write_batch, batches = GradMemModel._write, []

    def interrupted(model, context, *rest, **how):
        batches.append(len(context.input_ids))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return write_batch(model, context, *rest, **how)

    with monkeypatch.context() as patch:
        patch.setattr(GradMemModel, "_write", interrupted)
        result = write("rows.jsonl", "notes", "--max-tokens", 20)
    assert result.exit_code == 130
    assert "interrupted. Written now and stored: 2 segments; the same command continues" in result.stderr
    assert sum(batches[:2]) == len(MemoryStore("memory")) == 2
    assert figures(write("rows.jsonl", "notes", "--json"))["written"] == 5


def test_progress_in_a_log(monkeypatch):
    """Hours of work once logged nothing."""
    assert write("notes").stderr == ""  # it was short
    monkeypatch.setattr("gradmem_adapter.cli.bulk.EVERY", 0.0)
    lines = write("notes", "rows.jsonl", "--max-tokens", 20, store="other").stderr.splitlines()
    assert len(lines) > 3
    assert all(re.fullmatch(r"gradmem write: documents: .* of which written now: \d \(\d+ s\)", line) for line in lines)
    assert "documents: 5, tokens: 82, segments: 7, of which written now: 7" in lines[-1]


def test_progress_on_a_terminal(monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    assert "documents: 2, tokens: 55, segments: 4, of which written now: 4" in write("notes").stderr
