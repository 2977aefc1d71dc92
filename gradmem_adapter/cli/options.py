"""What commands share: options, how figures are printed, and what may be written where."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gradmem_adapter.utils.files import check_writable

if TYPE_CHECKING:
    import torch

    from gradmem_adapter import GradMemPipeline, MemoryStore

CHECKPOINT = typer.Option(help="A trained adapter: one that ships with the package, a directory, or a name on the hub.")
BACKBONE = typer.Option(
    help="A local directory, a hub id, or package:<package>/<file>.gguf; default: the one the adapter was made for.",
    show_default=False,
)
OF_LINES = "For JSON lines"
TEXT_FIELD = typer.Option(help="The field that holds the text.", rich_help_panel=OF_LINES)
SOURCE_FIELD = typer.Option(
    help="The field that holds the text's name; default: the file and the line number.", rich_help_panel=OF_LINES
)
JSON_LINES = typer.Option("--json-lines", help="Standard input is JSON lines.", rich_help_panel=OF_LINES)
JSON = typer.Option("--json", help="Print one JSON object, for programs, instead of tables.")
DEVICE = typer.Option(help="The device to run on; default: the GPU if there is one.", show_default=False)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def check_used(context: typer.Context, needed: str, there: bool, *names: str) -> None:
    """Raise for options that were given and would be passed over, since what they go with was not given.

    Args:
        context (`typer.Context`): of the command.
        needed (`str`): what they go with, as it stands on the command line.
        there (`bool`): whether it was given.
        names (`str`): of the parameters.

    Raises:
        ValueError: one of them was given.
    """
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in names and not there and source is not None and source.name == "COMMANDLINE":
            said = (option.opts if context.params[option.name] else option.secondary_opts or option.opts)[0]
            raise ValueError(f"{said} goes with {needed}: add that, or leave {said} out.")


def chosen_device(name: str | None) -> torch.device:
    """The device of a name; None: the GPU if there is one. Of several processes each has a GPU of its own.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    from gradmem_adapter.utils.hardware import device_here

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return device_here(
        f"cuda:{int(os.environ['LOCAL_RANK'])}" if name == "cuda" and "LOCAL_RANK" in os.environ else name
    )


def open_pipeline(checkpoint: str, backbone: str | None = None, device: str | None = None) -> GradMemPipeline:
    """The pipeline of a checkpoint.

    Args:
        checkpoint (`str`): as for `load_checkpoint`.
        backbone (`str`, *optional*): where it is; None: as the checkpoint says.
        device (`str`, *optional*): where it goes; None: the GPU if there is one.
    """
    from gradmem_adapter import GradMemPipeline, load_checkpoint

    return GradMemPipeline(*load_checkpoint(checkpoint, backbone=backbone, device=chosen_device(device)))


def print_json(figures: Mapping[str, Any]) -> None:
    """Print an object as a line of JSON.

    Args:
        figures (`Mapping[str, Any]`): what it holds.
    """
    typer.echo(json.dumps(figures))


def visible(text: str) -> str:
    """A text as a terminal may be given it: control characters but tabs and line ends as Python writes them, `\\x1b`.

    Args:
        text (`str`): of a model, a file or its name, who may tell a terminal to do what they like.
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def in_words(entries: Iterable[Mapping[str, Any]]) -> str:
    """Where stored texts are from: a line for each source, with the characters in it.

    Args:
        entries (`Iterable[Mapping[str, Any]]`): key, source, start and end of each.
    """
    places: dict[str, list[str]] = {}
    for entry in entries:
        source = f"state {entry['key']}" if entry["source"] is None else visible(entry["source"])
        places.setdefault(source, []).extend([] if entry["start"] is None else [f"{entry['start']}-{entry['end']}"])
    return "\n".join(f"{source}: {', '.join(found)}".removesuffix(": ") for source, found in places.items())


def check_output(path: Path, *, inputs: Iterable[Path], force: bool) -> None:
    """Raise before the work unless memory states may be saved there; on a terminal, ask before states are replaced.

    Args:
        path (`Path`): the file that will be written.
        inputs (`Iterable[Path]`): the files that are read, none of which it may be, forced or not.
        force (`bool`): replace what is there, whatever it is, without asking.

    Raises:
        OSError, ValueError: it may not; the message says why.
        typer.Abort: the answer was no.
    """
    from gradmem_adapter.utils.state_file import is_memory_state

    check_writable(path, inputs=inputs)
    if force or not path.exists():
        return
    if not is_memory_state(path):
        raise FileExistsError(f"{path} exists and is no memory state. Name another file, or replace it with --force.")
    if not sys.stdin.isatty():
        raise FileExistsError(
            f"{path} exists and holds what was written before. Name another file, or replace it with --force."
        )
    typer.confirm(f"{path} holds what was written before. Replace it?", abort=True)


def existing_store(path: Path) -> MemoryStore:
    """The memory store in a directory.

    Raises:
        FileNotFoundError: there is none.
    """
    from gradmem_adapter import MemoryStore

    store = MemoryStore(path)
    if not store.exists():
        raise FileNotFoundError(f"There is no memory store in {path}; gradmem write TEXTS --store {path} makes one.")
    return store


def check_source(store: MemoryStore, source: str) -> None:
    """Raise `ValueError` for a source that a memory store does not have.

    Args:
        store (`MemoryStore`): the store.
        source (`str`): where a text is from.
    """
    if next(store.entries(source), None) is None:
        raise ValueError(f"{store.path} has no source {source!r}. `gradmem store list` names the sources.")


def writable_store(path: Path, *, keep_text: bool, beside: Collection[str] = ()) -> MemoryStore:
    """The memory store in a directory, or one to be, which is not made before there is something to store.

    Args:
        path (`Path`): the directory.
        keep_text (`bool`): of the store.
        beside (`Collection[str]`, *optional*): names that may be in a directory that holds no store yet.

    Raises:
        FileExistsError: the directory holds something else.
        OSError: nothing can be written there.
        MemoryStoreError: the index is damaged or lost.
    """
    from gradmem_adapter import MemoryStore

    store = MemoryStore(path, keep_text=keep_text)
    names = [] if store.exists() or not path.exists() else [entry.name for entry in path.iterdir()]
    if any(not name.startswith(".") and name not in beside for name in names):
        raise FileExistsError(f"{path} holds other files and is no memory store. Name an empty or a new directory.")
    len(store)  # a damaged index shows here, and not after the first texts are written
    store.check_writable()
    return store
