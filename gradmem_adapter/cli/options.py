"""Shared by the commands: options, how figures are printed, and checks of outputs and stores."""

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

CHECKPOINT = typer.Option(
    help="A trained adapter: one that ships with the package, a directory, or a name on the hub, owner/name or "
    "owner/name@revision."
)
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
    """Raise for options that would be ignored because they need another option that was not given.

    Args:
        context (`typer.Context`): the command's context.
        needed (`str`): the option that they need, as written on the command line.
        there (`bool`): whether it was given.
        names (`str`): names of the parameters to check.

    Raises:
        ValueError: one of them was given without the needed option.
    """
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in names and not there and source is not None and source.name == "COMMANDLINE":
            said = (option.opts if context.params[option.name] else option.secondary_opts or option.opts)[0]
            raise ValueError(f"{said} needs {needed}: add it, or leave {said} out.")


def chosen_device(name: str | None) -> torch.device:
    """The device with a name; None: the GPU if there is one. If there are several processes, each gets its own GPU.

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
    """The pipeline of a checkpoint."""
    from gradmem_adapter import GradMemPipeline, load_checkpoint

    return GradMemPipeline(*load_checkpoint(checkpoint, backbone=backbone, device=chosen_device(device)))


def print_json(figures: Mapping[str, Any]) -> None:
    """Print an object as a line of JSON."""
    typer.echo(json.dumps(figures))


def visible(text: str) -> str:
    """A text that is safe to print on a terminal: control characters except tabs and line ends are escaped as `\\x1b`.

    Args:
        text (`str`): a text from a model, a file or a file's name, which may hold escape sequences.
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def in_words(entries: Iterable[Mapping[str, Any]]) -> str:
    """Where stored texts come from: a line for each source, with the ranges of characters in it.

    Args:
        entries (`Iterable[Mapping[str, Any]]`): key, source, start and end of each.
    """
    places: dict[str, list[str]] = {}
    for entry in entries:
        source = f"state {entry['key']}" if entry["source"] is None else visible(entry["source"])
        places.setdefault(source, []).extend([] if entry["start"] is None else [f"{entry['start']}-{entry['end']}"])
    return "\n".join(f"{source}: {', '.join(found)}".removesuffix(": ") for source, found in places.items())


def check_output(path: Path, *, inputs: Iterable[Path], force: bool) -> None:
    """Raise before the work unless memory states may be saved at a path. On a terminal, ask before replacing states.

    Args:
        path (`Path`): the file to write.
        inputs (`Iterable[Path]`): the files that are read, which must never be overwritten.
        force (`bool`): replace an existing file, whatever it is, without asking.

    Raises:
        OSError, ValueError: states may not be saved there; the message says why.
        typer.Abort: the user answered no.
    """
    from gradmem_adapter.utils.state_file import is_memory_state

    check_writable(path, inputs=inputs)
    if force or not path.exists():
        return
    if not is_memory_state(path):
        raise FileExistsError(f"{path} exists and is no memory state. Name another file, or replace it with --force.")
    if not sys.stdin.isatty():
        raise FileExistsError(f"{path} exists and holds memory states. Name another file, or replace it with --force.")
    typer.confirm(f"{path} exists and holds memory states. Replace it?", abort=True)


def existing_store(path: Path) -> MemoryStore:
    """The memory store in a directory.

    Raises:
        FileNotFoundError: there is no memory store.
    """
    from gradmem_adapter import MemoryStore

    store = MemoryStore(path)
    if not store.exists():
        raise FileNotFoundError(f"There is no memory store in {path}; gradmem write TEXTS --store {path} makes one.")
    return store


def check_source(store: MemoryStore, source: str) -> None:
    """Raise `ValueError` for a source that a memory store does not have."""
    if next(store.entries(source), None) is None:
        raise ValueError(f"{store.path} has no source {source!r}. `gradmem store list {store.path}` lists its sources.")


def writable_store(path: Path, *, keep_text: bool, beside: Collection[str] = ()) -> MemoryStore:
    """The memory store in a directory. A new store is created only when the first states are stored.

    Args:
        path (`Path`): the directory.
        keep_text (`bool`): whether the store keeps texts.
        beside (`Collection[str]`, *optional*): names of files allowed in a directory that holds no store yet.

    Raises:
        FileExistsError: the directory holds other files.
        OSError: the directory cannot be written.
        MemoryStoreError: the index is damaged or lost.
    """
    from gradmem_adapter import MemoryStore

    store = MemoryStore(path, keep_text=keep_text)
    names = [] if store.exists() or not path.exists() else [entry.name for entry in path.iterdir()]
    if any(not name.startswith(".") and name not in beside for name in names):
        raise FileExistsError(f"{path} holds other files and is not a memory store. Name an empty or a new directory.")
    len(store)  # raises now if the index is damaged, not after the first texts are written
    store.check_writable()
    return store
