"""The command `gradmem` and its subcommands."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from gradmem_adapter.cli.ask import ask
from gradmem_adapter.cli.demo import demo
from gradmem_adapter.cli.errors import DEBUG, Command, Commands
from gradmem_adapter.cli.export import export, export_states
from gradmem_adapter.cli.serve import serve
from gradmem_adapter.cli.store import app as store
from gradmem_adapter.cli.train import train
from gradmem_adapter.cli.write import write

app = typer.Typer(name="gradmem", cls=Commands, no_args_is_help=True, pretty_exceptions_show_locals=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gradmem-adapter {version('gradmem-adapter')}")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, DEBUG] = False,
) -> None:
    """Write long contexts into a few vectors by gradient descent, and answer from them (GradMem)."""


for command in (demo, write, ask, train, export, export_states, serve):
    app.command(cls=Command)(command)
app.add_typer(store, name="store")
