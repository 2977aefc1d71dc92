"""Write learning rates: one number, or learned rates for each of the first steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.layer import MemorySlots

Rate: TypeAlias = Tensor | float
"""A write learning rate: a number, or one for each element of the memory `[m, d]`."""


def rate_at(lrs: Sequence[Rate], step: int) -> Rate:
    """The write learning rate of a step: its own, or the last one if there are fewer rates than steps."""
    return lrs[min(step, len(lrs) - 1)]


def write_lrs(slots: MemorySlots, adapter: str, config: GradMemConfig, steps: int, taken: int = 0) -> Tensor:
    """The write learning rates of K steps, on the tape: the configured rate, or the learned rates of the first n steps.

    More than n steps take these n rates and then repeat the last one.

    Args:
        slots (`MemorySlots`): the layer that holds the learned rates.
        adapter (`str`): the adapter's name.
        config (`GradMemConfig`): its configuration.
        steps (`int`): K.
        taken (`int`, *optional*, defaults to `0`): the number of steps taken before these; they use up the first rates.

    Returns:
        `Tensor`: `[K]` or `[K, m, d]`; `[1]` where the rate is not learned.
    """
    if adapter not in slots.gradmem_log_write_lr:
        return slots.gradmem_memory[adapter].new_full((1,), config.write_lr)
    rates = slots.gradmem_log_write_lr[adapter][: taken + steps].exp()
    own = rates[taken:]
    return torch.cat([own, rates[-1:].expand(steps - len(own), *rates.shape[1:])])
