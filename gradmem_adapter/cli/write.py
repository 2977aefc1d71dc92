"""`gradmem write`: write texts into memory states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradmem_adapter.cli.bulk import print_outcome, write_to_store
from gradmem_adapter.cli.inputs import Document, Inputs, is_one_text
from gradmem_adapter.cli.options import (
    BACKBONE,
    CHECKPOINT,
    DEVICE,
    JSON,
    JSON_LINES,
    SOURCE_FIELD,
    TEXT_FIELD,
    check_output,
    check_used,
    chosen_device,
    open_pipeline,
    print_json,
    visible,
    writable_store,
)
from gradmem_adapter.cli.processes import PATIENCE, meet
from gradmem_adapter.cli.reading import STDIN
from gradmem_adapter.utils.shipped import QA, shipped

if TYPE_CHECKING:
    from gradmem_adapter import MemoryState

PATHS = """Texts in UTF-8: files, directories, quoted patterns, or - for standard input. Each file is one text; in
JSON lines (.jsonl), each line is."""
STORE = """A memory store for texts of any length, written in segments. Stored texts are not written again: after an
interruption, the same command continues."""


def write(
    context: typer.Context,
    paths: Annotated[list[str], typer.Argument(help=PATHS)],
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="A file for the states, one for each text, however long.")
    ] = None,
    store: Annotated[Path | None, typer.Option(file_okay=False, help=STORE)] = None,
    checkpoint: Annotated[str, CHECKPOINT] = QA,
    backbone: Annotated[str | None, BACKBONE] = None,
    text_field: Annotated[str, TEXT_FIELD] = "text",
    source_field: Annotated[str | None, SOURCE_FIELD] = None,
    json_lines: Annotated[bool, JSON_LINES] = False,
    segment_tokens: Annotated[
        int | None,
        typer.Option(
            help="The most tokens in a segment; default: two per memory vector.", rich_help_panel="With --store"
        ),
    ] = None,
    keep_text: Annotated[
        bool,
        typer.Option(
            "--keep-text/--no-text",
            help="Also keep the texts, by which ask finds the states for a question.",
            rich_help_panel="With --store",
        ),
    ] = True,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Write steps; default: the checkpoint's, or 100 with self_study.")
    ] = None,
    objective: Annotated[
        Literal["reconstruction", "self_study"],
        typer.Option(
            help="What write steps lower; self_study needs no training but takes seconds to minutes per text."
        ),
    ] = "reconstruction",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per batch; default: what fits into memory.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what the output file holds, whatever it is.")] = False,
    device: Annotated[str | None, DEVICE] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write texts into memory states: one state per text in a file, or texts of any length into a memory store."""
    from gradmem_adapter import WriteOptions

    if (store is None) is (output is None):
        raise ValueError("Say where the states go: either --output FILE or --store DIR.")
    check_used(context, "--store", store is not None, "segment_tokens", "keep_text")
    check_used(context, "--output", output is not None, "force")
    check_used(context, "- (standard input)", STDIN in paths, "json_lines")
    rows = json_lines or not all(map(is_one_text, paths))
    check_used(context, "JSON lines (.jsonl, or --json-lines)", rows, "text_field", "source_field")
    inputs = Inputs(paths, text_field, source_field, json_lines, without=store)
    how: dict[str, Any] = {"options": WriteOptions(steps=steps, objective=objective), "max_tokens": max_tokens}
    place = chosen_device(device)
    with meet(cpu=place.type == "cpu", patience=PATIENCE) as processes:
        if processes.num_processes > 1 and (store is None or STDIN in paths):
            raise ValueError(
                "Several processes can only write files, directories and patterns into a store: use --store, and no -."
            )
        if store is not None:
            there = writable_store(store, keep_text=keep_text)
            counts = write_to_store(there, open_pipeline(checkpoint, backbone, device), inputs, segment_tokens, **how)
    if store is not None:
        if processes.is_main_process:
            print_outcome(counts, inputs, as_json)
    elif output is not None:
        documents = inputs.read_all()
        own = (file for file in (shipped(checkpoint) or Path(checkpoint)).rglob("*") if file.is_file())
        check_output(output, inputs=[*map(Path, paths), *(Path(one.source) for one in documents), *own], force=force)
        pipeline = open_pipeline(checkpoint, backbone, device)
        states = pipeline.write_many([document.text for document in documents], **how)
        states.save(output)
        _print_states(documents, states, as_json)


def _print_states(documents: Sequence[Document], states: MemoryState, as_json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {
            "source": document.source,
            "tokens": int(state.context_tokens),
            "nbytes": state.nbytes,
            "write_loss": state.write_losses[0, -1].item(),
        }
        for document, state in zip(documents, states, strict=True)
    ]
    if as_json:
        print_json({"states": rows})
        return
    table = Table("source", "tokens", "bytes", "last write loss")
    for row in rows:
        numbers = (f"{row['tokens']:,}", f"{row['nbytes']:,}", f"{row['write_loss']:.4f}")
        table.add_row(Text(visible(row["source"])), *numbers)
    Console().print(table)
