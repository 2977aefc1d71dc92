"""The file format of memory states: safetensors with a description and a digest in one metadata key."""

from __future__ import annotations

import hashlib
import json
import os
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
VERSION = 3
"""Files of version 2 have no entry; those of version 3 have one, and may have vectors in int8."""
TENSORS = ("vectors", "context_tokens", "write_losses")
SCALES = "scales"
"""`[B, m]`: the factors of int8 vectors."""
MAX_CONTEXT_TOKENS = 2**40
"""A generous limit; the sum over a million such states still fits into 64 bits."""
_KEY = "gradmem"
"""The only metadata key: safetensors writes several in no fixed order, and equal states would give different bytes."""
_FIELDS = {2: {"format", "version", "fingerprint", "digest"}}
_FIELDS[3] = _FIELDS[2] | {"entry"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPES: dict[str, tuple[str, ...]] = {
    "vectors": _FLOATS,
    "context_tokens": ("I64", "I32", "I16", "I8", "U8"),
    "write_losses": _FLOATS,
}
_DTYPES_INT8 = _DTYPES | {"vectors": ("I8",), SCALES: ("F32",)}
_KINDS = {
    "vectors": "floating point",
    "context_tokens": "integers",
    "write_losses": "floating point",
    SCALES: "float32",
}
_MAX_HEADER = 2**20


class MemoryStateError(ValueError):
    """A file or bytes that cannot be read as a memory state."""


def encode(tensors: Mapping[str, Tensor], fingerprint: str, entry: Mapping[str, Any] | None = None) -> bytes:
    """Encode tensors as one safetensors file; equal states give equal bytes.

    Args:
        tensors (`Mapping[str, Tensor]`): those of `TENSORS`, and `SCALES` where the vectors are in int8.
        fingerprint (`str`): the fingerprint of the model that wrote them.
        entry (`Mapping[str, Any]`, *optional*): what a memory store keeps with a state, as JSON values.

    Raises:
        ValueError: the entry is too long for a file's header, or a number of tokens is out of range.
    """
    if wrong := _wrong_counts(tensors["context_tokens"]):
        raise ValueError(wrong)
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    description = {"format": FORMAT, "version": 2, "fingerprint": fingerprint}
    if entry is not None:
        description |= {"version": VERSION, "entry": entry}
    description["digest"] = _digest(plain, fingerprint, entry)
    data = safetensors_save(plain, metadata={_KEY: json.dumps(description, sort_keys=True, ensure_ascii=entry is None)})
    if (size := int.from_bytes(data[:8], "little")) > _MAX_HEADER:
        raise ValueError(
            f"Text and metadata of a state take {size:,} bytes of its file, but at most {_MAX_HEADER:,} are allowed. "
            "Store less metadata, or write the text in segments."
        )
    return data


def narrowed(vectors: Tensor, dtype: str) -> dict[str, Tensor]:
    """Convert vectors `[B, m, d]` to a smaller dtype; returns the tensors for a file.

    In int8 the largest value of a vector becomes 127 and the others are rounded: q = round(v / s), s = max |v| / 127.

    Args:
        vectors (`Tensor`): `[B, m, d]`.
        dtype (`str`): `"int8"`, or the name of a floating dtype of torch.
    """
    if dtype != "int8":
        return {"vectors": vectors.to(getattr(torch, dtype))}
    scales = vectors.float().abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return {"vectors": (vectors.float() / scales[..., None]).round().to(torch.int8), SCALES: scales}


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by the names in `TENSORS`, with vectors in a floating-point dtype.

    Args:
        tensors (`Mapping[str, Tensor]`): as `decode` returns them.
    """
    named = {name: tensors[name] for name in TENSORS if name in tensors}
    if SCALES in tensors:
        named["vectors"] = tensors["vectors"].float() * tensors[SCALES][..., None]
    return named


def decode(data: bytes | bytearray | memoryview) -> tuple[dict[str, Tensor], str, dict[str, Any] | None]:
    """The tensors of a file as stored, the fingerprint, and the entry if there is one. Never unpickles.

    Raises:
        MemoryStateError: the data is truncated, damaged, not a memory state, or from a newer version.
        TypeError: it is not bytes.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"Expected the bytes of a memory state, got {type(data).__name__}.")
    data = bytes(data)
    description = _description(data[: 8 + _MAX_HEADER], len(data))
    try:
        tensors = safetensors_load(data)
    except (SafetensorError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise MemoryStateError(f"The data is truncated or damaged: {error}.") from error
    fingerprint, entry = description["fingerprint"], description.get("entry")
    if description["digest"] != _digest(tensors, fingerprint, entry):
        raise MemoryStateError("The memory state is damaged: its digest does not match its content.")
    vectors, scales = tensors["vectors"], tensors.get(SCALES)
    if scales is not None and scales.shape != vectors.shape[:2]:
        raise MemoryStateError(
            f"The memory state is damaged: its scales have shape {tuple(scales.shape)}, expected "
            f"{tuple(vectors.shape[:2])}."
        )
    if not (vectors if scales is None else scales).isfinite().all():
        raise MemoryStateError("The memory state has vectors that are not finite, so no model can read it.")
    if wrong := _wrong_counts(tensors["context_tokens"]):
        raise MemoryStateError(wrong)
    return tensors, fingerprint, entry


def _wrong_counts(tokens: Tensor) -> str | None:
    """What is wrong with numbers of tokens, or None; used both to save and to load."""
    if not tokens.numel() or 1 <= int(tokens.min()) <= int(tokens.max()) <= MAX_CONTEXT_TOKENS:
        return None
    return (
        f"The memory state says that its contexts have {int(tokens.min())} to {int(tokens.max())} tokens; the allowed "
        f"range is 1 to {MAX_CONTEXT_TOKENS}."
    )


def read(path: Path) -> bytes:
    """Read a file if it begins like a memory state.

    Raises:
        MemoryStateError: it is not a memory state, or larger than free memory.
        OSError: it cannot be opened, or is not a regular file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        _description(file.read(8 + _MAX_HEADER), size)
        if size > (free := psutil.virtual_memory().available):
            raise MemoryStateError(f"It has {size:,} bytes, but only {free:,} bytes of memory are free.")
        file.seek(0)
        return file.read()


def is_memory_state(path: Path) -> bool:
    """Whether a file begins like a memory state; the rest may be damaged."""
    try:
        with open_regular(path) as file:
            _description(file.read(8 + _MAX_HEADER), os.fstat(file.fileno()).st_size)
    except MemoryStateError:
        return False
    return True


def _description(head: bytes, size: int) -> dict[str, Any]:
    """The description at the beginning of a file of `size` bytes.

    Raises:
        MemoryStateError: it is not a memory state that this version can read.
    """
    # A safetensors file starts with the length of its JSON header in 8 bytes, which may begin like a pickle (0x80).
    if head[8:9] != b"{" and (head[:4] == b"PK\x03\x04" or head[:1] == b"\x80"):
        raise MemoryStateError(
            "This looks like a pickle (torch.save). Pickles are never opened, because they can run code. Save memory "
            "states with MemoryState.save."
        )
    header_end = 8 + int.from_bytes(head[:8], "little")
    if len(head) < 10 or head[8:9] != b"{":
        raise MemoryStateError("This is not a memory state: it is not a safetensors file.")
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
            "This is not a memory state: it is a safetensors file without the description that MemoryState.save adds."
        ) from error
    if kind != FORMAT:
        raise MemoryStateError(f"This is not a memory state: its format is {str(kind)[:50]!r}.")
    if type(version) is not int or version < 2 or not isinstance(fingerprint, str):
        raise MemoryStateError("The description of the memory state is damaged: its version or fingerprint is invalid.")
    if version > VERSION:
        raise MemoryStateError(
            f"This memory state has format version {version}, but this gradmem_adapter knows versions up to {VERSION}. "
            "Upgrade gradmem-adapter to read it."
        )
    if description.keys() != _FIELDS[version]:
        raise MemoryStateError(
            f"The description of the memory state is damaged: it has the fields {sorted(description)}, expected "
            f"{sorted(_FIELDS[version])}."
        )
    allowed = _DTYPES_INT8 if "entry" in description and SCALES in dtypes else _DTYPES
    if dtypes.keys() != allowed.keys():
        raise MemoryStateError(
            f"The memory state has the wrong tensors: expected {sorted(allowed)}, got {sorted(dtypes)}."
        )
    for name, dtype in dtypes.items():
        if dtype not in allowed[name]:
            raise MemoryStateError(
                f"The memory state has a wrong tensor: {name} must be {_KINDS[name]}, got {str(dtype)[:50]}."
            )
    if size != header_end + end:
        raise MemoryStateError(
            f"The data is truncated or damaged: it has {size} bytes, but its header describes {header_end + end}."
        )
    return description


def _digest(tensors: Mapping[str, Tensor], fingerprint: str, entry: Mapping[str, Any] | None) -> str:
    """SHA-256 of the fingerprint, the entry and of every tensor's name, type, shape and bits."""
    names = [name for name in (*TENSORS, SCALES) if name in tensors]
    shapes = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in names]
    what = [FORMAT, fingerprint, shapes, *([] if entry is None else [entry])]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
