"""The wheel, in its own environment and directory: it carries adapters, and answers."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STORY = (
    "Hans lived at the edge of a dark forest. In the snow he found a golden key. The princess gave Hans a silver ring."
)


def run(*command, **options):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder with the commands of an environment that has the wheel, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    venv.create(folder / "env", symlinks=True)
    own = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    site = Path(sysconfig.get_path("purelib", "posix_prefix", vars=own))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", wheel)
    return python.parent


@pytest.fixture
def inside(installed, tmp_path):
    """Runs a program of that environment in an empty directory, and returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run_inside(program, *arguments):
        result = run(installed / program, *arguments, cwd=tmp_path, env=environment)
        assert result.stderr == ""
        return result.stdout

    return run_inside


@pytest.mark.slow
@pytest.mark.smollm
def test_the_wheel_answers_questions(inside, tmp_path):
    (tmp_path / "story.txt").write_text(STORY)
    (answer,) = json.loads(inside("gradmem", "ask", "Where did Hans live?", "--text", "story.txt", "--json"))["answers"]
    assert "dark forest" in answer["answer"]


@pytest.mark.slow
def test_the_wheel_retrieves_values(inside):
    assert json.loads(inside("gradmem", "demo", "--task", "kv", "--json"))["kv"]["exact_match"] > 0.8


@pytest.mark.slow
def test_the_wheel_is_what_runs(inside, installed):
    from gradmem_adapter import __version__

    assert inside("gradmem", "--version") == f"gradmem-adapter {__version__}\n"
    found = inside("python", "-c", "from importlib.util import find_spec; print(find_spec('gradmem_adapter').origin)")
    assert found.startswith(str(installed.parent))
