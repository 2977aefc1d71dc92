"""Every command with every kind of bad input: exit status 2, one message, no traceback, no file changed."""

import os

import pytest
from bad_inputs import cases, lay_out
from bad_recipes import evaluation_cases
from commands import invoke

from evaluation.cli import app as evaluation
from gradmem_adapter.cli import app as gradmem

CASES = [(gradmem, "gradmem", case) for case in cases()] + [(evaluation, "evaluation", c) for c in evaluation_cases()]
"""Some 1,500: 300 of each command of `gradmem`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("bad"), os.getcwd()
    os.chdir(folder)
    lay_out(folder)
    yield folder
    os.chdir(before)


def contents(folder):
    """Kind, inode and size of every entry, and when small files were written."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            entry = os.lstat(path)
            small = os.path.isfile(path) and not os.path.islink(path) and entry.st_size < 2**20
            found[path] = (entry.st_mode, entry.st_ino, entry.st_size, entry.st_mtime_ns if small else None)
    return found


def attack(folder, app, program, arguments):
    before = contents(folder)
    result = invoke(*arguments, app=app)
    assert result.exit_code == 2, f"{result.exit_code}: {result.output}{result.exception!r}"
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    if not {"Usage", "Error"} & set(result.stderr.replace(":", " ").split()):  # Typer's own words, in a frame
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"{program} {arguments[0]}: "), lines
        assert "is a bug" not in lines[0]
    assert len(" ".join(lines)) > 30, "the message must say something"
    assert contents(folder) == before


def parameters(chosen):
    return pytest.mark.parametrize(
        ("app", "program", "arguments"), chosen, ids=[" ".join((c[1], *c[2]))[:150] for c in chosen]
    )


@parameters(CASES[::50])
def test_a_sample_of_bad_inputs_is_refused(folder, app, program, arguments):
    attack(folder, app, program, arguments)


@pytest.mark.slow
@parameters(CASES)
def test_all_bad_inputs_are_refused(folder, app, program, arguments):
    attack(folder, app, program, arguments)
