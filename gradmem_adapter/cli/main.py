"""The command and its parts."""

from __future__ import annotations

import typer

from gradmem_adapter.cli.ask import ask
from gradmem_adapter.cli.demo import demo
from gradmem_adapter.cli.train import train
from gradmem_adapter.cli.write import write

app = typer.Typer(
    help="Write long contexts into a few vectors by gradient descent, and answer from them (GradMem).",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
for command in (demo, write, ask, train):
    app.command()(command)
