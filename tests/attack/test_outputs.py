"""Outputs that are inputs, devices, or files nobody asked to replace stay as they are."""

import os

import pytest
import typer
from commands import invoke
from peft import get_peft_model
from tiny import tiny, tiny_tokenizer

from gradmem_adapter import GradMemConfig, MemoryState, load_backbone, save_checkpoint


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained("backbone")
    tiny_tokenizer().save_pretrained("backbone")
    model, tokenizer = load_backbone("./backbone")
    save_checkpoint(get_peft_model(model, GradMemConfig(num_memory_tokens=2, write_steps=1)), tokenizer, "checkpoint")
    for name in ("notes.txt", "other.txt"):
        (tmp_path / name).write_text("w1 w2 w3")
    (tmp_path / "link").symlink_to("notes.txt")
    os.link("notes.txt", "second name")


def write(*arguments, text="notes.txt"):
    return invoke("write", text, "--checkpoint", "checkpoint", "--device", "cpu", *arguments)


def contents(folder):
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize(
    "output", ["notes.txt", "./notes.txt", "link", "second name", "checkpoint/adapter_model.safetensors"]
)
def test_an_input_is_never_overwritten(tmp_path, output, force):
    before = contents(tmp_path)
    result = write("--output", output, *force)
    assert result.exit_code == 2, result.output
    assert "is one of the inputs" in " ".join(result.stderr.split())
    assert contents(tmp_path) == before


@pytest.mark.parametrize("output", ["/dev/null", "pipe", "link to null"])
def test_a_device_is_never_replaced(tmp_path, output):
    os.mkfifo("pipe")
    os.symlink("/dev/null", "link to null")
    before = _identity(output)
    result = write("--output", output, "--force")
    assert result.exit_code == 2, result.output
    assert "regular file" in " ".join(result.stderr.split())
    assert _identity(output) == before
    with pytest.raises(OSError, match="regular file"):
        MemoryState.save(_state(tmp_path), output)
    assert _identity(output) == before


def _identity(path):
    """What stays the same unless the entry is replaced; reading it may change its times."""
    entry = os.lstat(path)
    return entry.st_mode, entry.st_dev, entry.st_ino


def _state(folder):
    assert write("--output", "states", "--force").exit_code == 0
    return MemoryState.load(folder / "states")


def test_other_files_are_replaced_only_with_force(tmp_path):
    before = contents(tmp_path)
    result = write("--output", "other.txt")
    assert result.exit_code == 2, result.output
    assert "other.txt exists and is no memory state" in " ".join(result.stderr.split())
    assert contents(tmp_path) == before
    assert write("--output", "other.txt", "--force").exit_code == 0
    assert len(MemoryState.load("other.txt")) == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_memory_states_are_not_replaced_without_force_or_a_question(tmp_path, monkeypatch, damaged):
    state = _state(tmp_path)
    if damaged:
        os.truncate("states", state.nbytes)
    before = contents(tmp_path)
    result = write("--output", "states", text="other.txt")
    assert result.exit_code == 2, result.output
    assert "exists and" in " ".join(result.stderr.split())
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("answer", "replaced"), [(True, True), (False, False)])
def test_the_user_is_asked_on_a_terminal(tmp_path, monkeypatch, answer, replaced):
    _state(tmp_path)
    (tmp_path / "other.txt").write_text("w4 w5")
    before = contents(tmp_path)
    asked = []

    def confirm(question, abort):
        asked.append(question)
        if not answer:
            raise typer.Abort

    monkeypatch.setattr("gradmem_adapter.cli.options.typer.confirm", confirm)
    monkeypatch.setattr("gradmem_adapter.cli.options.sys", _Terminal)
    result = write("--output", "states", text="other.txt")
    assert asked == ["states exists and holds memory states. Replace it?"]
    assert (result.exit_code == 0) == replaced
    assert (contents(tmp_path) != before) == replaced


class _Terminal:
    class stdin:
        isatty = staticmethod(lambda: True)


def test_ask_replaces_no_existing_file(tmp_path):
    before = contents(tmp_path)
    for state in ("notes.txt", "link", "/dev/null"):
        result = invoke("ask", "w1", "--text", "notes.txt", "--state", state, "--checkpoint", "checkpoint")
        assert result.exit_code == 2, result.output
    assert contents(tmp_path) == before
