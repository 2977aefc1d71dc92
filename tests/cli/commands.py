"""The `gradmem` command, run in this process."""

from __future__ import annotations

from typing import Any

from typer import Typer
from typer.testing import CliRunner, Result

from gradmem_adapter.cli import app


def invoke(*arguments: Any, app: Typer = app) -> Result:
    """`gradmem ...`, or another command, on a wide terminal without colours."""
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner(env=environment).invoke(app, [str(argument) for argument in arguments])
