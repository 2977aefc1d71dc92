"""The file of a state in a memory store: the state, and all that the index has of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gradmem_adapter.state import MemoryState
from gradmem_adapter.store.entry import Entry
from gradmem_adapter.utils import state_file
from gradmem_adapter.utils.state_file import MemoryStateError, narrowed, widened

Dtype = Literal["float32", "bfloat16", "int8"]
_KEY = re.compile(r"[0-9a-f]{32}")
_OF_THE_STATE = ("key", "text", "options", "written")
OF_A_PLACE = ("source", "start", "end", "metadata")


def state_file_of(states: Path, key: str) -> Path:
    """Where a state is, whether or not it is there.

    Args:
        states (`Path`): the folder of all.
        key (`str`): the state's.

    Raises:
        ValueError: it is no key.
    """
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"The key of a memory state is a text of 32 hexadecimal digits, got {key!r}.")
    return states / key[:2] / f"{key}.safetensors"


def check_dtype(dtype: str) -> None:
    """Raise `ValueError` unless vectors can be of it in files."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {get_args(Dtype)}, got {dtype!r}.")


def new_tensors(states: MemoryState, dtype: Dtype | None) -> dict[str, Tensor]:
    """What files hold of states, each of one.

    Args:
        states (`MemoryState`): B of them.
        dtype (`str`, *optional*): of the vectors in the files; None: the states' own.

    Raises:
        ValueError: another dtype than files have.
    """
    kept = {"context_tokens": states.context_tokens, "write_losses": states.write_losses}
    if dtype is None:
        return kept | {"vectors": states.vectors}
    check_dtype(dtype)
    return kept | narrowed(states.vectors, dtype)


def write_file(file: Path, tensors: Mapping[str, Tensor], entries: Sequence[Entry]) -> list[Entry]:
    """Make the file of one state, which is on the disk then.

    Args:
        file (`Path`): a new one.
        tensors (`Mapping[str, Tensor]`): as `new_tensors` or `read_file` returns them.
        entries (`Sequence[Entry]`): one for each place, alike in all else.

    Returns:
        `list[Entry]`: the entries, with the file's size.
    """
    one = entries[0]
    kept = {name: getattr(one, name) for name in _OF_THE_STATE}
    places = [{name: getattr(entry, name) for name in OF_A_PLACE} for entry in entries]
    data = state_file.encode(tensors, one.fingerprint, kept | {"places": places})
    with file.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
    return [replace(entry, nbytes=len(data)) for entry in entries]


def read_file(file: Path) -> tuple[dict[str, Tensor], list[Entry]]:
    """The tensors of one state as they are in its file, and its entries, one for each place.

    Args:
        file (`Path`): what `write_file` made.

    Raises:
        FileNotFoundError: it is not there.
        MemoryStateError: it is damaged, or another state's.
        OSError: it cannot be read.
    """
    data = state_file.read(file)
    tensors, fingerprint, stored = state_file.decode(data)
    try:
        fields: dict[str, Any] = dict(stored or {})
        places = fields.pop("places")
        common = fields | {"tokens": int(tensors["context_tokens"]), "fingerprint": fingerprint, "nbytes": len(data)}
        entries = [Entry(**place, **common) for place in places]
        key = entries[0].key
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        raise MemoryStateError(f"It is not as a memory store writes it: {error!r}.") from error
    if key != file.stem:
        raise MemoryStateError(f"It is another state's, {str(key)[:120]!r}: it was copied or renamed.")
    return tensors, entries


def read_memory(file: Path) -> tuple[MemoryState, list[Entry]]:
    """A state, in float32, and its entries.

    Args:
        file (`Path`): what `write_file` made.

    Raises:
        As `read_file`.
    """
    tensors, entries = read_file(file)
    try:
        state = MemoryState(**widened(tensors), fingerprint=entries[0].fingerprint)
    except (TypeError, ValueError) as error:
        raise MemoryStateError(f"It has a wrong tensor: {error}") from error
    return state.to(dtype=torch.float32), entries
