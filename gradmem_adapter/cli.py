"""The `gradmem` command, thin over the API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .backbones import SMOLLM2
from .demo import demo_text, run_demo

app = typer.Typer(
    help="Write long contexts into a few vectors by gradient descent, and answer from them (GradMem).",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    """Keeps `gradmem demo` a command of its own while it is the only one."""


@app.command()
def demo(
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file with the text; default: one that ships.")
    ] = None,
    backbone: Annotated[
        str, typer.Option(help="A local directory, a hub id, or package:<package>/<file>.gguf.")
    ] = SMOLLM2,
    memory_tokens: Annotated[
        int | None, typer.Option(help="Memory vectors; at most a quarter of the text's tokens; default: a fifth.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Write steps at most.")] = 300,
    lr: Annotated[float, typer.Option(help="Write learning rate of Adam.")] = 0.03,
    seed: Annotated[int, typer.Option(help="Seed of the first memory.")] = 0,
) -> None:
    """Write a paragraph into a few vectors, forget it, and recite it. Exit status 1 if it does not come back."""
    try:
        result = run_demo(
            demo_text(text), backbone=backbone, memory_tokens=memory_tokens, steps=steps, lr=lr, seed=seed
        )
    except (ValueError, OSError, ImportError) as error:
        Console(stderr=True).print(f"gradmem demo: {error}", style="red", markup=False)
        raise typer.Exit(2) from error
    if not result.reconstructed:
        raise typer.Exit(1)
