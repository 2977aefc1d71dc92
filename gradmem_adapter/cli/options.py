"""What commands share: options, the texts of files, and what may be written where."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import typer

from gradmem_adapter.utils.files import check_writable, read_text
from gradmem_adapter.utils.state_file import is_memory_state

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
"""Trained adapters of the source tree; the wheel does not carry them."""

MAX_CONTEXT_BYTES = 2**26
"""64 MiB: longer than any context that is written."""

DEVICE = typer.Option(help="Where to run; default: the GPU if there is one.", show_default=False)


def chosen_device(name: str | None) -> torch.device:
    """The device of a name; None: the GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's of kinds that there once were
            device = torch.device(name)
            torch.zeros(1, device=device).item()  # which is how one finds out
    except (RuntimeError, AssertionError, ImportError) as error:
        there = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise ValueError(f"There is no device {name!r} here; use --device {there}.") from error
    return device


def context_of(file: Path) -> str:
    """The text of a file that is to be written into memory.

    Raises:
        ValueError: it is empty, or no text in UTF-8.
    """
    text = read_text(file, max_bytes=MAX_CONTEXT_BYTES)
    if not text.strip():
        raise ValueError(f"{file} is empty: there is nothing to write.")
    return text


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
