"""The command as a whole."""

import subprocess
import sys
from importlib.metadata import version

import pytest
from commands import invoke


def test_help():
    result = invoke("--help")
    assert result.exit_code == 0
    assert "GradMem" in result.output
    for command in ("write", "ask", "store", "train", "demo"):
        assert command in result.output


def test_help_waits_for_no_library():
    """Importing torch, Transformers and PEFT takes seconds. The package is executed when a command needs it."""
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


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"gradmem-adapter {version('gradmem-adapter')}"


def test_the_help_of_train_says_what_a_row_has():
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
                "--lr",
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
def test_help_of_commands(command, options):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    for option in options:
        assert option in result.output


def test_as_a_module():
    result = subprocess.run([sys.executable, "-m", "gradmem_adapter.cli", "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
