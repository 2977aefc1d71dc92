"""The `gradmem` command, run in this process."""

from __future__ import annotations

import json
from typing import Any

from typer import Typer
from typer.testing import CliRunner, Result

from gradmem_adapter.cli import app


def invoke(*arguments: Any, app: Typer = app) -> Result:
    """`gradmem ...`, or another command, on a wide terminal without colours."""
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner(env=environment).invoke(app, [str(argument) for argument in arguments])


def figures(output: str, name: str = "demo") -> dict[str, Any]:
    """The figures of the line that begins with a name."""
    (line,) = (line for line in output.splitlines() if line.startswith(f"{name}: "))
    return json.loads(line.removeprefix(f"{name}: "))
