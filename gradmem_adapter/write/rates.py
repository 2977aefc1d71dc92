"""Write learning rates: one number, or learned rates for each of the first steps.

Only the shipped retrieval weights need the factors counted from the last step (`write_lr_from_end`), `keep_write_lrs`
and `NEUTRAL`. Once those weights are trained without them, remove these from here, from the configuration and from
`MemorySlots`, together with `may_lack` of `load_weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.layer import MemorySlots

Rate: TypeAlias = Tensor | float
"""A write learning rate: a number, or one for each element of the memory `[m, d]`."""

NEUTRAL = ("gradmem_log_write_lr_end",)
"""Tensors that have no effect before they are trained: weights that were trained without them can be trained further
with them."""


def rate_at(lrs: Sequence[Rate], step: int) -> Rate:
    """The write learning rate of a step: its own, or the last one if there are fewer rates than steps."""
    return lrs[min(step, len(lrs) - 1)]


def write_lrs(slots: MemorySlots, adapter: str, config: GradMemConfig, steps: int, taken: int = 0) -> Tensor:
    """The write learning rates of K steps, on the tape: the configured rate, or the learned rates of the first n steps,
    a_k, times the factors counted from the last step, f_i (`write_lr_from_end`):

        a_k f_{K-1-k}    of step k = 0 .. K-1,    K <= n.

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
    logs = slots.gradmem_log_write_lr[adapter][: taken + steps]
    if adapter in slots.gradmem_log_write_lr_end:
        logs = logs + slots.gradmem_log_write_lr_end[adapter][: len(logs)].flip(0)
    rates = logs.exp()
    own = rates[taken:]
    return torch.cat([own, rates[-1:].expand(steps - len(own), *rates.shape[1:])])


def keep_write_lrs(model: PeftModel, n: int) -> None:
    """Keep only the learned write learning rates (and factors) of the first n steps. Modifies a trained model in place.

    WRITE of up to n steps is unchanged, and further steps repeat the last rate. A model with rates for more steps than
    training ever drew does better with fewer.

    Args:
        model (`PeftModel`): a model with an active GradMem adapter, whose `num_write_lrs` becomes n.
        n (`int`): between 1 and `num_write_lrs`.

    Raises:
        ValueError: n is out of range, or the adapter has no learned rates.
    """
    adapter, config = model.active_adapter, cast(GradMemConfig, model.active_peft_config)
    slots = cast(MemorySlots, model.base_model.slots)
    if config.learn_write_lr == "no":
        raise ValueError("keep_write_lrs() needs learned write learning rates; this adapter has learn_write_lr='no'.")
    if not 1 <= n <= config.num_write_lrs:
        raise ValueError(f"n must be between 1 and num_write_lrs ({config.num_write_lrs}), got {n}.")
    for rates in (slots.gradmem_log_write_lr, slots.gradmem_log_write_lr_end):
        if adapter in rates:
            kept = rates[adapter].detach()[:n].clone()
            rates[adapter] = nn.Parameter(kept, requires_grad=rates[adapter].requires_grad)
    config.num_write_lrs = n
