"""The file of a state in a memory store: the state, and everything that the index says about it."""

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
    """The path of a state's file, which need not exist.

    Args:
        states (`Path`): the folder of all states.
        key (`str`): the state's key.

    Raises:
        ValueError: `key` is not a valid key.
    """
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"The key of a memory state must be a string of 32 hexadecimal digits, got {key!r}.")
    return states / key[:2] / f"{key}.safetensors"


def check_dtype(dtype: str) -> None:
    """Raise `ValueError` unless files can hold vectors of this dtype."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {get_args(Dtype)}, got {dtype!r}.")


def new_tensors(states: MemoryState, dtype: Dtype | None) -> dict[str, Tensor]:
    """The tensors that the files of states hold; row i belongs to the file of state i.

    Args:
        states (`MemoryState`): B states.
        dtype (`str`, *optional*): dtype of the vectors in the files; None: that of the states.

    Raises:
        ValueError: files cannot hold vectors of this dtype.
    """
    kept = {"context_tokens": states.context_tokens, "write_losses": states.write_losses}
    if dtype is None:
        return kept | {"vectors": states.vectors}
    check_dtype(dtype)
    return kept | narrowed(states.vectors, dtype)


def write_file(file: Path, tensors: Mapping[str, Tensor], entries: Sequence[Entry]) -> list[Entry]:
    """Create the file of one state and flush it to disk.

    Args:
        file (`Path`): a file that does not exist yet.
        tensors (`Mapping[str, Tensor]`): as `new_tensors` or `read_file` returns them.
        entries (`Sequence[Entry]`): one for each place, otherwise equal.

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

    Raises:
        FileNotFoundError: the file does not exist.
        MemoryStateError: it is damaged, or belongs to another state.
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
        raise MemoryStateError(f"The file is not one that a memory store wrote: {error!r}.") from error
    if key != file.stem:
        raise MemoryStateError(f"The file belongs to another state, {str(key)[:120]!r}: it was copied or renamed.")
    return tensors, entries


def read_memory(file: Path) -> tuple[MemoryState, list[Entry]]:
    """A state, in float32, and its entries.

    Raises:
        As `read_file`.
    """
    tensors, entries = read_file(file)
    try:
        state = MemoryState(**widened(tensors), fingerprint=entries[0].fingerprint)
    except (TypeError, ValueError) as error:
        raise MemoryStateError(f"The file has an invalid tensor: {error}") from error
    return state.to(dtype=torch.float32), entries
