"""Which memory a KV cache was made with: the cache of an earlier turn answers from its own memory, whatever is passed
with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

_NAMES = ("past_key_values", "cache_params")
"""The names of caches in Transformers' arguments and outputs; the second is used by models such as Mamba."""
_TIE = "_gradmem_memory"
"""The attribute of a cache that holds its memory `[rows, m, d]`. Reordering keeps it, and copies have it too."""


def tie_caches(caches: Mapping[str, Any], memory: Tensor | None, strict: bool = False) -> None:
    """Tie the KV caches among arguments or outputs to the memory that they are read with.

    Args:
        caches (`Mapping`): caches and other values by name; anything but caches of Transformers is ignored.
        memory (`Tensor`, *optional*): `[B, m, d]`, the memory of each row. `None`: read without memory.
        strict (`bool`, *optional*, defaults to `False`): refuse a cache that was filled with another memory.

    Raises:
        ValueError: with `strict`, a cache was filled with another memory.
    """
    for name in _NAMES:
        if isinstance(cache := caches.get(name), Cache):
            if strict and not _is_empty(cache):
                _check(name, getattr(cache, _TIE, None), memory)
            # A copy: vectors can be changed in place.
            setattr(cache, _TIE, None if memory is None else memory.detach().clone())


def _check(name: str, made: Tensor | None, memory: Tensor | None) -> None:
    if made is None and memory is None:
        return
    if made is None or memory is None or not _is_same(made, memory):
        other = "without memory" if made is None else "with a memory" if memory is None else "with another memory"
        raise ValueError(
            f"{name} was filled {other}, and the answer would come from that. Pass the memory of the first turn, or "
            f"leave {name} out to read the whole prompt again. strict=False continues from the cache at your own risk."
        )


def _is_same(made: Tensor, memory: Tensor) -> bool:
    """Whether rows read the memory that a cache was made with. If rows were removed from the cache, any of its memories
    count."""
    if made.shape[1:] != memory.shape[1:]:
        return False
    every, rest = divmod(len(memory), len(made))  # several answers to a prompt, or one state for all
    if not rest:
        return torch.equal(made.repeat_interleave(every, dim=0).to(memory), memory)
    known, read = ({row.tobytes() for row in rows.cpu().numpy()} for rows in (made.to(memory), memory))
    return read <= known


def _is_empty(cache: Cache) -> bool:
    try:
        return not cache.get_seq_length()
    except ValueError:  # only linear layers (Mamba), which count no tokens
        return not cache.has_previous_state()
