"""The command as a whole."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from commands import invoke


def test_help_lists_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    assert "GradMem" in result.output
    for command in ("write", "ask", "store", "train", "demo"):
        assert command in result.output


def test_help_imports_no_slow_library():
    """Importing torch, Transformers and PEFT takes seconds. The package is imported when a command needs it."""
    code = """
import sys, gradmem_command
gradmem_command._put_in_place()
from gradmem_adapter.cli import app
for command in ("ask", "write", "train", "export", "serve", "demo", "store"):
    app([command, "--help"], standalone_mode=False)
assert not {"torch", "transformers", "peft"} & sys.modules.keys()
from gradmem_adapter import GradMemConfig
from peft import PeftType
assert PeftType.GRADMEM == GradMemConfig().peft_type
sys.argv = ["gradmem", "--version"]
gradmem_command.main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"gradmem-adapter {version('gradmem-adapter')}"
    assert "Usage: " in result.stdout


@pytest.mark.parametrize(
    "start", ["import gradmem_command; gradmem_command.main()", "runpy.run_module('evaluation', run_name='__main__')"]
)
def test_an_interrupt_during_imports_ends_quietly(start):
    """Before Typer is there to handle it."""
    code = f"""
import runpy, sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
{start}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (result.returncode, result.stderr) == (130, "")


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"gradmem-adapter {version('gradmem-adapter')}"


def test_the_help_of_train_names_the_fields_of_a_row():
    result = invoke("train", "--help")
    assert all(name in result.output for name in ("context", "query", "target", "queries", "targets", "answers"))


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "demo",
            (
                "--text",
                "--backbone",
                "--memory-tokens",
                "--steps",
                "--seed",
                "--task",
                "--pairs",
                "--checkpoint",
                "--json",
            ),
        ),
        (
            "write",
            ("--checkpoint", "--backbone", "--output", "--store", "--steps", "--max-tokens", "--device", "--json"),
        ),
        (
            "ask",
            (
                "--text",
                "--checkpoint",
                "--backbone",
                "--state",
                "--store",
                "--k",
                "--steps",
                "--max-new-tokens",
                "--json",
            ),
        ),
        ("store", ("list", "show", "verify", "gc", "forget", "rebuild", "stats")),
    ],
)
def test_the_help_of_a_command_lists_its_options(command, options):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    for option in options:
        assert option in result.output


def test_the_cli_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "gradmem_adapter.cli", "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("ask w1 --text a.txt --k 4", "--k needs --store"),
        ("ask w1 --state s --steps 3", "--steps needs --text"),
        ("ask w1 --store s --steps 3", "--steps needs --text"),
        ("demo --task kv --text a.txt", "--text needs --task recite or --task tour"),
        ("demo --task ask --memory-tokens 3", "--memory-tokens needs --task recite"),
        ("demo --task ask --steps 3", "--steps needs --task recite or --task kv"),
        ("demo --task ask --seed 3", "--seed needs"),
        ("demo --task recite --checkpoint c", "--checkpoint needs --task ask"),
        ("demo --pairs 3", "--pairs needs --task kv"),
        ("write a.txt --output o --segment-tokens 8", "--segment-tokens needs --store"),
        ("write a.txt --output o --no-text", "--no-text needs --store"),
        ("write a.txt --store s --force", "--force needs --output"),
        ("write a.txt --store s --json-lines", "--json-lines needs - (standard input)"),
        ("write a.txt - --output o --text-field t", "--text-field needs JSON lines"),
        ("write a.txt --store s --source-field t", "--source-field needs JSON lines"),
        ("serve c --store s --engine-model m", "--engine-model needs --reader vllm"),
        ("serve c --store s --engine-key k", "--engine-key needs --reader vllm"),
        ("train a.txt --output o --set rows=b.jsonl", "--set rows=... repeats an option of the command line"),
        ("export c d --lora --gguf float32", "--gguf needs --merge"),
    ],
)
def test_no_option_is_silently_ignored(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("w1")
    result = invoke(*arguments.split())
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())
