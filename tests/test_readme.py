"""The README's code runs, and its commands exist."""

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradmem_adapter.cli import app
from gradmem_adapter.recipes import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    return [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.mark.smollm
def test_python_runs_from_top_to_bottom(tmp_path):
    """All blocks in one process, as a reader would paste them."""
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")), encoding="utf-8")
    result = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Fidelity(greedy=" in result.stdout


def test_there_are_commands_to_test():
    assert "make demo" in commands()
    assert "make test" in commands()
    assert len(blocks("python")) >= 4


@pytest.mark.parametrize("command", commands())
def test_commands_exist(command, tmp_path, monkeypatch):
    """`make` targets resolve (`gradmem demo` and the tests themselves run elsewhere), `gradmem` commands run."""
    program, *arguments = shlex.split(command)
    if program == "make":
        if shutil.which("make") is None:
            pytest.fail("make is needed for the README's commands")
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
    else:
        if program == "torchrun":  # tests/test_processes.py starts two processes
            assert arguments[2:4] == ["-m", "gradmem_adapter.cli"]
            program, arguments = "gradmem", arguments[4:]
        assert program == "gradmem"
        monkeypatch.chdir(ROOT)
        if arguments[0] == "ask":  # the adapter of the README's code; tests/test_cli.py asks one
            assert CliRunner().invoke(app, [*arguments, "--help"]).exit_code == 0
            return
        if arguments[0] == "train":  # an hour of a GPU: that the recipe is sound must do
            assert arguments[2] == "--output"
            recipe = load_recipe(Path(arguments[1]))
            if getattr(recipe, "init_from", None):  # what a command before it would have made
                trained = {other.split()[-1] + "/checkpoint" for other in commands() if " train " in other}
                assert recipe.init_from in trained
                recipe = dataclasses.replace(recipe, init_from=None)
            recipe.build()
            return
        lighter = {"eval": ["--contexts", "2"], "plot": ["--output", str(tmp_path)]}
        assert CliRunner().invoke(app, [*arguments, *lighter.get(arguments[0], [])]).exit_code == 0


def test_fifteen_lines():
    for what in ("get_peft_model", "langchain_core"):
        block = next(block for block in blocks("python") if what in block)
        assert len([line for line in block.splitlines() if line.strip()]) <= 15
