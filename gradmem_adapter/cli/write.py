"""`gradmem write`: files in, a file of memory states out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradmem_adapter.checkpoint import load_checkpoint
from gradmem_adapter.cli.options import DEVICE, check_output, chosen_device, context_of
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.write.options import Objective


def write(
    files: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="Texts in UTF-8, one context each.")],
    checkpoint: Annotated[Path, typer.Option(exists=True, file_okay=False, help="What `gradmem train` made.")],
    output: Annotated[Path, typer.Option(dir_okay=False, help="The file for the memory states, in order.")],
    steps: Annotated[
        int | None, typer.Option(min=0, help="Write steps; default: the checkpoint's, or 100 with self_study.")
    ] = None,
    objective: Annotated[
        Objective,
        typer.Option(help="What write steps lower; self_study needs no training, and takes seconds to minutes a text."),
    ] = "reconstruction",
    max_tokens: Annotated[int | None, typer.Option(help="Tokens at once; default: what memory allows.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what the output file holds, whatever it is.")] = False,
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Write texts into one memory state each, all in one file."""
    own = (file for file in checkpoint.rglob("*") if file.is_file())
    check_output(output, inputs=[*files, *own], force=force)
    texts = [context_of(file) for file in files]
    pipeline = GradMemPipeline(*load_checkpoint(checkpoint, device=chosen_device(device)))
    states = pipeline.write_many(texts, steps=steps, max_tokens=max_tokens, objective=objective)
    states.save(output)
    table = Table("file", "tokens", "bytes", "last write loss")
    for file, state in zip(files, states, strict=True):
        loss = state.write_losses[0, -1].item()
        table.add_row(Text(str(file)), str(int(state.context_tokens)), str(state.nbytes), f"{loss:.4f}")
    Console().print(table)
