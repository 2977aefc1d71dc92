"""README and docs: their code runs and prints what they show, their commands and links exist, their lines are short."""

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import typer.cli
from typer.testing import CliRunner

from gradmem_adapter.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLE = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", flags=re.DOTALL)
"""A block of code, and its output if that is shown."""


def examples(page):
    return EXAMPLE.findall(page.read_text(encoding="utf-8"))


def commands(page):
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def of_all_pages(what):
    # The lab log records the past: what it shows need not run today.
    return [
        pytest.param(item, id=f"{page.stem}: {item}") for page in PAGES if page.stem != "LOG" for item in what(page)
    ]


@pytest.mark.smollm
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem != "LOG" and examples(page)], ids=lambda page: page.stem
)
def test_examples_run_and_print_what_is_shown(page, tmp_path):
    """A page's blocks, one after another in one process, as a reader would paste them."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    blocks, shown = zip(*examples(page), strict=True)
    script = tmp_path / "page.py"
    script.write_text("\nprint('\\x1e')\n".join(blocks), encoding="utf-8")
    result = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for block, printed, expected in zip(blocks, result.stdout.split("\x1e\n"), shown, strict=True):
        if expected:
            assert printed == expected, block


def test_the_command_line_page_is_up_to_date(tmp_path):
    """`make docs` generates it."""
    arguments = ["gradmem_adapter.cli.main", "utils", "docs", "--name", "gradmem", "--title", "Command line"]
    result = CliRunner().invoke(typer.cli.app, [*arguments, "--output", str(tmp_path / "cli.md")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "cli.md").read_text(encoding="utf-8") == (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", of_all_pages(commands))
def test_documented_commands_exist(command, monkeypatch):
    """`make` targets resolve, modules are there, and `gradmem` knows its commands and options."""
    program, *arguments = shlex.split(command.removeprefix(".venv/bin/"))
    if program == "make":
        if shutil.which("make") is None:
            pytest.fail("make is needed for the documented commands")
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif "-m" in arguments and program in {"python", "accelerate", "torchrun"}:
        monkeypatch.syspath_prepend(str(ROOT))
        assert importlib.util.find_spec(arguments[arguments.index("-m") + 1]) is not None
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    elif program == "gradmem":
        options = [argument for argument in arguments if argument.startswith("--")]
        help_text = CliRunner().invoke(app, [arguments[0], "--help"], env={"COLUMNS": "200"}).output
        assert all(option in help_text for option in options), help_text
    else:
        assert program in {"curl", "mkdir", "pip", "pre-commit", ".ci/run"}


def links(page):
    """What a page's links and pictures point at in this repository."""
    found = re.findall(r"\]\((?!https?:|#)([^)#]*)", page.read_text(encoding="utf-8"))
    return [str((page.parent / target).resolve().relative_to(ROOT)) for target in found]


@pytest.mark.parametrize("target", of_all_pages(links))
def test_links_have_targets(target):
    assert (ROOT / target).exists()


CARDS = [ROOT / "evaluation" / "README.md", *sorted((ROOT / "checkpoints").glob("*/README.md"))]


WRITTEN = [page for page in (*PAGES, *CARDS) if page.name != "cli.md"]  # that one is generated


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_lines_are_short(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 160 and not line.startswith("|")] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_changelog_has_this_version():
    from gradmem_adapter import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_quoted_messages_exist_in_the_code():
    """Troubleshooting quotes what the code says, and names every exception of the package."""
    said, exceptions = [], []
    for file in [*(ROOT / "gradmem_adapter").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                exceptions.append(node.exc.func.id)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    tables = page.split("| message | why | what to do |\n")[1:]
    cells = [line.split(" | ")[0] for table in tables for line in table.splitlines() if line.startswith("| `")]
    quoted = [quote for cell in cells for quote in re.findall(r"`([^`]+)`", cell)]
    quoted = [quote for quote in quoted if "GRADMEM" not in quote]  # PEFT says these
    parts = [part.strip() for quote in quoted for part in quote.split("…") if part.strip()]
    text = "\0".join(said)
    assert [part for part in parts if part not in text] == []
    assert {name for name in exceptions if name.endswith(("Error", "Diverged"))} - set(re.findall(r"\w+", page)) <= {
        "ApiError",
        "AttributeError",
        "ConnectionError",
        "IndexError",
        "IsADirectoryError",
        "ReferenceError",
        "RequestValidationError",
        "RuntimeError",
    }


@pytest.mark.slow
@pytest.mark.smollm
def test_the_notebook_prints_what_it_shows(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    def printed(notebook):
        outputs = [cell.get("outputs", ()) for cell in notebook.cells]
        return ["".join(output.text for output in found if output.get("name") == "stdout") for found in outputs]

    kept = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    assert printed(NotebookClient(deepcopy(kept), timeout=600, resources=resources).execute()) == printed(kept)


@pytest.mark.slow
@pytest.mark.smollm
def test_the_quickstart_prints_what_it_shows(tmp_path):
    """Its files are created and its commands run one after another, as by a newcomer."""
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    for name, text in re.findall(r"```\w+ title=\"(.*?)\"\n(.*?)```", page, flags=re.DOTALL):
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = f"{shlex.quote(sys.executable)} -c 'import gradmem_command; gradmem_command.main()'"
    for commands, expected in re.findall(r"```bash\n(.*?)```\n(?:\n```text\n(.*?)```)?", page, flags=re.DOTALL):
        if "pip install" in commands:
            continue
        script = re.sub(r"^gradmem ", lambda _: f"{command} ", commands, flags=re.MULTILINE)
        result = subprocess.run(["bash", "-e"], input=script, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        if expected:
            assert re.sub(r"\d+\.\d\d s\)", "… s)", result.stdout) == expected
