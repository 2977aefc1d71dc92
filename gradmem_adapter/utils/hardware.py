"""What the device has: free memory, and how much work fits into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.utils.backbone import device_of

SATURATED = {"cuda": 16_384, "cpu": 2_048}
"""Padded tokens a batch beyond which a device gets no faster, only fuller."""

SHARE_OF_FREE_MEMORY = {"cuda": 0.3, "cpu": 0.6}
"""What the tensors of a batch may fill of it. On a GPU, graphs of other shapes want their part."""

OVERHEAD = {"cpu": 2.0}
"""How much more memory a process takes than its tensors have: on a CPU freed blocks are not given back at once."""

UNCHECKED = 2**28
"""A write that needs less than 256 MiB begins without a look at what is free."""


def token_budget(backbone: PreTrainedModel, max_memory: int | None = None) -> int:
    """How many padded tokens to write at once.

    Args:
        backbone (`PreTrainedModel`): the causal LM, on its device and in its type.
        max_memory (`int`, *optional*): bytes that they may take. `None`: a share of the device's free memory.

    Returns:
        `int`: at least 1, at most what saturates the device.
    """
    device = device_of(backbone)
    share = SHARE_OF_FREE_MEMORY.get(device.type, SHARE_OF_FREE_MEMORY["cpu"])
    room = share * free_memory(device) if max_memory is None else max_memory
    return max(1, min(int(room / write_memory(backbone, 1, 1)), SATURATED.get(device.type, SATURATED["cpu"])))


def check_memory(backbone: PreTrainedModel, batch: int, length: int, max_memory: int | None = None) -> None:
    """Raise `MemoryError` where contexts cannot be written in the memory that is free: on a CPU the system would end
    the process without a word.

    Args:
        backbone (`PreTrainedModel`): the causal LM, on its device and in its type.
        batch (`int`): how many contexts are written at once.
        length (`int`): tokens of the longest.
        max_memory (`int`, *optional*): bytes that they may take. `None`: what the device has free.
    """
    needed = write_memory(backbone, batch, length)
    if max_memory is None and needed < UNCHECKED:
        return
    room = free_memory(device_of(backbone)) if max_memory is None else max_memory
    if needed > room:
        raise MemoryError(
            f"To write {f'{batch} contexts' if batch > 1 else 'a context'} of {length:,} tokens takes about "
            f"{needed / 1e9:.2g} GB, and {room / 1e9:.2g} GB are {'free' if max_memory is None else 'allowed'}. "
            "GradMemPipeline.write_document (or gradmem write --store) writes a long text in segments, write_many many "
            "texts in batches; in bfloat16 a model needs half."
        )


def write_memory(backbone: PreTrainedModel, batch: int, length: int) -> float:
    """About how many bytes WRITE takes for its backward pass.

    A frozen layer keeps about 5 hidden and 3 intermediate vectors of each token for it, and eager attention two weights
    for each pair of tokens and each head besides.

    Args:
        backbone (`PreTrainedModel`): the causal LM, on its device and in its type.
        batch (`int`): how many contexts are written at once.
        length (`int`): tokens of the longest.
    """
    config = backbone.config.get_text_config()

    def size(name: str, otherwise: int) -> int:
        value = getattr(config, name, None)
        return value if isinstance(value, int) else otherwise  # some have one for each layer

    hidden = size("hidden_size", cast(Tensor, backbone.get_input_embeddings().weight).shape[-1])
    values = 5 * hidden + 3 * size("intermediate_size", 4 * hidden)
    if config._attn_implementation == "eager":
        values += 2 * length * size("num_attention_heads", 1)
    tensors = batch * length * values * size("num_hidden_layers", 1) * backbone.dtype.itemsize
    return tensors * OVERHEAD.get(device_of(backbone).type, 1.0)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, as far as the process may have them.

    Args:
        device (`torch.device`): a GPU, or anything else, which counts as the CPU.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return max(0, min([psutil.virtual_memory().available, *_left_by_control_groups()]))


_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Files of Linux's control groups, version 2 and 1."""


def _left_by_control_groups() -> Iterator[int]:
    """What each control group (container, service) that the process is in leaves of its limit. psutil knows nothing of
    them, and the system ends who goes beyond."""
    groups = _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else []
    for _, kind, name in (line.split(":", 2) for line in groups):
        root = _GROUPS / kind
        own = root / name.lstrip("/")
        for folder in (own, *own.parents) if kind in ("", "memory") else ():
            for limit, usage in _LIMITS:
                try:
                    left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                    kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                except (OSError, ValueError):  # no such group here, or no limit
                    continue
                yield left + int(kept.get("total_inactive_file") or kept.get("inactive_file") or 0)  # pages of files
