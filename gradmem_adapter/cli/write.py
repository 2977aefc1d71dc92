"""`gradmem write`: texts in, a file of memory states out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradmem_adapter.checkpoint import load_checkpoint
from gradmem_adapter.cli.inputs import Document, Inputs
from gradmem_adapter.cli.options import (
    CHECKPOINT,
    DEVICE,
    JSON,
    JSON_LINES,
    QA_CHECKPOINT,
    SOURCE_FIELD,
    TEXT_FIELD,
    check_output,
    chosen_device,
    print_json,
)
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.state import MemoryState
from gradmem_adapter.write.options import Objective

PATHS = """Texts in UTF-8: files, directories, patterns in quotes, - for standard input. A file is one context; of
JSON lines (.jsonl) each line is."""


def write(
    paths: Annotated[list[str], typer.Argument(help=PATHS)],
    output: Annotated[Path, typer.Option(dir_okay=False, help="The file for the memory states, in order.")],
    checkpoint: Annotated[Path, CHECKPOINT] = QA_CHECKPOINT,
    text_field: Annotated[str, TEXT_FIELD] = "text",
    source_field: Annotated[str | None, SOURCE_FIELD] = None,
    json_lines: Annotated[bool, JSON_LINES] = False,
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
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write texts into one memory state each, all in one file."""
    documents = Inputs(paths, text_field, source_field, json_lines).read_all()
    own = (file for file in checkpoint.rglob("*") if file.is_file())
    check_output(output, inputs=[*map(Path, paths), *(Path(one.source) for one in documents), *own], force=force)
    pipeline = GradMemPipeline(*load_checkpoint(checkpoint, device=chosen_device(device)))
    texts = [document.text for document in documents]
    states = pipeline.write_many(texts, steps=steps, max_tokens=max_tokens, objective=objective)
    states.save(output)
    written = [_figures(document, state) for document, state in zip(documents, states, strict=True)]
    if as_json:
        print_json({"output": str(output), "states": written})
        return
    table = Table("source", "tokens", "bytes", "last write loss")
    for row in written:
        table.add_row(Text(row["source"]), str(row["tokens"]), str(row["bytes"]), f"{row['write_loss']:.4f}")
    Console().print(table)


def _figures(document: Document, state: MemoryState) -> dict[str, Any]:
    """What is told of a text and its state."""
    return {
        "source": document.source,
        "tokens": int(state.context_tokens),
        "bytes": state.nbytes,
        "write_loss": state.write_losses[0, -1].item(),
    }
