"""How commands end if something is wrong: one line, an exit status, and a traceback on request."""

import errno
import warnings

import pytest
import torch
from commands import invoke
from tiny import tiny_text

from gradmem_adapter import GradMemPipeline, MemoryState


@pytest.fixture
def arguments(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(tiny_text(12))
    return [
        "ask",
        "w1",
        "--text",
        "notes.txt",
        "--checkpoint",
        str(checkpoint),
        "--device",
        "cpu",
        "--max-new-tokens",
        2,
    ]


def failing(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(GradMemPipeline, "generate", fail)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ValueError("it is\n  wrong"), 2, "gradmem ask: it is wrong\n"),
        (ValueError(), 2, "gradmem ask: ValueError\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a/b"),
            2,
            "a/b: Permission denied. Change its permissions",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "a/b: No space left on device. Make room there"),
        (MemoryError(), 2, "Out of memory. Use shorter texts"),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), 2, "another --device. Tried to allocate 2 GiB"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried"), 2, "Out of memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            2,
            "Out of memory",
        ),
        (
            KeyError("x"),
            1,
            "This is a bug in gradmem-adapter, not a problem with your input. KeyError: 'x'. Please report",
        ),
        (RuntimeError("shape '[1]'"), 1, "This is a bug in gradmem-adapter"),
        (AssertionError(), 1, "the output of the same command with --debug"),
    ],
    ids=repr,
)
def test_each_error_is_one_line(arguments, monkeypatch, error, status, words):
    failing(monkeypatch, error)
    result = invoke(*arguments)
    assert result.exit_code == status
    assert words in result.stderr
    assert result.stderr.count("\n") == 1, "no progress bars, no trace"


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyError("x")])
@pytest.mark.parametrize("place", [0, 1, 99])
def test_debug_shows_the_traceback_wherever_it_is_given(arguments, monkeypatch, error, place):
    failing(monkeypatch, error)
    plain = invoke(*arguments)
    arguments.insert(place, "--debug")
    result = invoke(*arguments)
    assert result.exit_code == plain.exit_code
    assert "Traceback (most recent call last)" in result.stderr
    assert "in fail" in result.stderr
    assert result.stderr.endswith(plain.stderr)


def test_our_warnings_are_one_line_and_those_of_libraries_are_hidden(arguments, monkeypatch):
    generate = GradMemPipeline.generate

    def warn(*positional, **named):
        warnings.warn("look\n at this", UserWarning, stacklevel=2)
        warnings.warn("changes in version 9", FutureWarning, stacklevel=2)
        return generate(*positional, **named)

    monkeypatch.setattr(GradMemPipeline, "generate", warn)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == "gradmem ask: look at this\n"
    with pytest.warns((UserWarning, FutureWarning)) as seen:
        invoke(*arguments, "--debug")
    assert "changes in version 9" in {str(one.message) for one in seen}, "as Python shows them, with their place"


def test_an_interrupt_is_not_an_error(arguments, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt())
    result = invoke(*arguments)
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_answers_are_printed_although_the_disk_is_full(arguments, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")  # a failed write does not name its file

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    result = invoke(*arguments, "--state", "kept")
    assert result.exit_code == 2
    assert "(support " in result.stdout
    assert (
        result.stderr
        == "gradmem ask: kept: cannot be written: No space left on device. Make room there, or name another place.\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone", "checkpoint", "notes.txt"]


def test_a_question_that_fails_saves_no_state(arguments, tmp_path, monkeypatch):
    failing(monkeypatch, ValueError("wrong"))
    assert invoke(*arguments, "--state", "kept").exit_code == 2
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("question", "words"),
    [("notes.txt", "--text notes.txt; put a pattern for several files in quotes"), (" ", "A question is empty")],
)
def test_file_names_and_empty_questions_are_refused(arguments, question, words):
    result = invoke("ask", question, *arguments[2:])
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_byte_order_mark_is_not_written(arguments, tmp_path):
    assert invoke(*arguments, "--state", "plain").exit_code == 0
    (tmp_path / "notes.txt").write_text(tiny_text(12), encoding="utf-8-sig")
    assert invoke(*arguments, "--state", "marked").exit_code == 0
    assert MemoryState.load("plain") == MemoryState.load("marked")
