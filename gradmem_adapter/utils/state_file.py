"""The file format of memory states: safetensors, a description in one metadata key, and a digest of everything."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from gradmem_adapter.utils.files import open_regular

FORMAT = "gradmem-memory-state"
VERSION = 2
"""Files of version 1 have no digest."""
TENSORS = ("vectors", "context_tokens", "write_losses")
MAX_CONTEXT_TOKENS = 2**24
"""More than anybody writes; READ generates as many tokens where it is asked to give a context back."""
_KEY = "gradmem"
"""The one metadata key: with several, safetensors writes them in no fixed order and equal states differ in bytes."""
_FIELDS = {1: {"format", "version", "fingerprint"}, 2: {"format", "version", "fingerprint", "digest"}}
_FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPES = {"vectors": _FLOATS, "context_tokens": ("I64", "I32", "I16", "I8", "U8"), "write_losses": _FLOATS}
_KINDS = {"vectors": "floating point", "context_tokens": "integers", "write_losses": "floating point"}
_MAX_HEADER = 2**20


class MemoryStateError(ValueError):
    """A file or bytes that cannot be read as a memory state."""


def encode(tensors: Mapping[str, Tensor], fingerprint: str) -> bytes:
    """One safetensors file; equal states give equal bytes.

    Args:
        tensors (`Mapping[str, Tensor]`): those of `TENSORS`.
        fingerprint (`str`): of the model that wrote them.
    """
    plain = {name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in TENSORS}
    description = {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint}
    description["digest"] = _digest(plain, fingerprint)
    return safetensors_save(plain, metadata={_KEY: json.dumps(description, sort_keys=True)})


def decode(data: bytes | bytearray | memoryview) -> tuple[dict[str, Tensor], str]:
    """The tensors and the fingerprint of a file. Never unpickles.

    Args:
        data (`bytes`): what `encode` made.

    Raises:
        MemoryStateError: the data is truncated, foreign, damaged or of a newer version.
        TypeError: it is no bytes.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"Memory states are read from bytes, got {type(data).__name__}.")
    data = bytes(data)
    description = _description(data[: 8 + _MAX_HEADER], len(data))
    try:
        tensors = safetensors_load(data)
    except (SafetensorError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise MemoryStateError(f"The data is truncated or damaged: {error}.") from error
    fingerprint: str = description["fingerprint"]
    if "digest" not in description:
        warnings.warn(
            "This memory state has no digest, because an older gradmem_adapter saved it: whether it is damaged cannot "
            "be told. Save it anew to give it one.",
            stacklevel=4,
        )
    elif description["digest"] != _digest(tensors, fingerprint):
        raise MemoryStateError("The memory state is damaged: it does not have the digest that it was saved with.")
    if not tensors["vectors"].isfinite().all():
        raise MemoryStateError("The memory state has vectors that are not finite, which no model can read.")
    tokens = tensors["context_tokens"]
    if tokens.numel() and not 1 <= int(tokens.min()) <= int(tokens.max()) <= MAX_CONTEXT_TOKENS:
        raise MemoryStateError(
            f"The memory state says that its contexts have from {int(tokens.min())} to {int(tokens.max())} tokens; "
            f"from 1 to {MAX_CONTEXT_TOKENS} can be."
        )
    return tensors, fingerprint


def read(path: Path) -> bytes:
    """The bytes of a file whose beginning is that of a memory state.

    Args:
        path (`Path`): the file.

    Raises:
        MemoryStateError: it is not one, or larger than the memory that is free.
        OSError: it cannot be opened, or is no regular file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        _description(file.read(8 + _MAX_HEADER), size)
        if size > (free := psutil.virtual_memory().available):
            raise MemoryStateError(f"It has {size:,} bytes, and {free:,} bytes of memory are free.")
        file.seek(0)
        return file.read()


def is_memory_state(path: Path) -> bool:
    """Whether a file begins as a memory state does, whatever has become of the rest.

    Args:
        path (`Path`): an existing file.
    """
    try:
        with open_regular(path) as file:
            _description(file.read(8 + _MAX_HEADER), os.fstat(file.fileno()).st_size)
    except MemoryStateError:
        return False
    return True


def _description(head: bytes, size: int) -> dict[str, Any]:
    """What the beginning of a file of `size` bytes says it is.

    Raises:
        MemoryStateError: no memory state that this version reads.
    """
    # A safetensors file starts with the length of its JSON header in 8 bytes, which may begin like a pickle (0x80).
    if head[8:9] != b"{" and (head[:4] == b"PK\x03\x04" or head[:1] == b"\x80"):
        raise MemoryStateError(
            "This looks like a pickle (torch.save), which can run code when it is read and is never opened. Save "
            "memory states with MemoryState.save."
        )
    header_end = 8 + int.from_bytes(head[:8], "little")
    if len(head) < 10 or head[8:9] != b"{":
        raise MemoryStateError("This is not a memory state: it is no safetensors file.")
    if size < header_end:
        raise MemoryStateError(f"The data ends after {size} bytes, inside its header: it is truncated.")
    if header_end > 8 + _MAX_HEADER:
        raise MemoryStateError(f"This is not a memory state: its header has more than {_MAX_HEADER:,} bytes.")
    try:
        header = json.loads(head[8:header_end])
        description = json.loads(header.pop("__metadata__", {})[_KEY])
        kind, version, fingerprint = (description[name] for name in ("format", "version", "fingerprint"))
        dtypes = {name: entry["dtype"] for name, entry in header.items()}
        end = max(int(entry["data_offsets"][1]) for entry in header.values())
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise MemoryStateError(
            "This is not a memory state: it is a safetensors file without the description that MemoryState.save "
            "puts in."
        ) from error
    if kind != FORMAT:
        raise MemoryStateError(f"This is not a memory state but {str(kind)[:50]!r}.")
    if type(version) is not int or version < 1 or not isinstance(fingerprint, str):
        raise MemoryStateError("The description of the memory state is damaged: its version or fingerprint is none.")
    if version > VERSION:
        raise MemoryStateError(
            f"This memory state has format version {version}, and this gradmem_adapter knows versions up to "
            f"{VERSION}: upgrade gradmem-adapter to read it."
        )
    if description.keys() != _FIELDS[version]:
        raise MemoryStateError(f"The description of the memory state is damaged: it has {sorted(description)}.")
    if dtypes.keys() != _DTYPES.keys():
        raise MemoryStateError(
            f"The memory state lacks a tensor or has a wrong one: it has {sorted(dtypes)} and should have "
            f"{sorted(_DTYPES)}."
        )
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES[name]:
            raise MemoryStateError(
                f"The memory state has a wrong tensor: {name} must be {_KINDS[name]}, got {str(dtype)[:50]}."
            )
    if size != header_end + end:
        raise MemoryStateError(
            f"The data is truncated or damaged: it has {size} bytes, and its header describes {header_end + end}."
        )
    return description


def _digest(tensors: Mapping[str, Tensor], fingerprint: str) -> str:
    """SHA-256 of the fingerprint and of every tensor's name, type, shape and bits."""
    shapes = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in TENSORS]
    digest = hashlib.sha256(json.dumps([FORMAT, fingerprint, shapes]).encode())
    for name in TENSORS:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
