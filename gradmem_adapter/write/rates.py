"""Write learning rates: one number, or learned ones for each of the first steps.

The factors that are counted from the end (`write_lr_from_end`), `keep_write_lrs` and `NEUTRAL` serve the shipped
retrieval weights alone. They go from here, from the configuration and from `MemorySlots` once those weights are trained
without them, and `may_lack` of `load_weights` with them.
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
"""What changes nothing before it is trained: weights trained without it can be trained further with it."""


def rate_at(lrs: Sequence[Rate], step: int) -> Rate:
    """The write learning rate of a step: its own, or the last where there are fewer."""
    return lrs[min(step, len(lrs) - 1)]


def write_lrs(slots: MemorySlots, adapter: str, config: GradMemConfig, steps: int, taken: int = 0) -> Tensor:
    """The write learning rates of K steps, on the tape: the configuration's, or the learned ones of the first n steps,
    a_k, times the factors that are counted from the last of them, f_i (`write_lr_from_end`):

        a_k f_{K-1-k}    of step k = 0 .. K-1,    K <= n.

    What ends well goes on well: more than n steps are those n and then the last of them again and again.

    Args:
        slots (`MemorySlots`): the layer that holds the learned rates.
        adapter (`str`): the adapter's name.
        config (`GradMemConfig`): its configuration.
        steps (`int`): K.
        taken (`int`, *optional*, defaults to `0`): steps that were taken before these, which count as the first of
            them all.

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
    """Keep the learned write learning rates (and factors) of the first n steps alone, in place and after training.

    WRITE of up to n steps stays as it is, and further steps go on as the last of them. A model that was trained with
    more rates, some of whose numbers of steps training never drew, does better with fewer.

    Args:
        model (`PeftModel`): a model with an active GradMem adapter, whose `num_write_lrs` becomes n.
        n (`int`): from 1 to `num_write_lrs`.

    Raises:
        ValueError: n is out of range, or there are no learned rates.
    """
    adapter, config = model.active_adapter, cast(GradMemConfig, model.active_peft_config)
    slots = cast(MemorySlots, model.base_model.slots)
    if config.learn_write_lr == "no":
        raise ValueError("keep_write_lrs() needs learned write learning rates; this adapter has learn_write_lr='no'.")
    if not 1 <= n <= config.num_write_lrs:
        raise ValueError(f"n must be from 1 to num_write_lrs, {config.num_write_lrs}, got {n}.")
    for rates in (slots.gradmem_log_write_lr, slots.gradmem_log_write_lr_end):
        if adapter in rates:
            kept = rates[adapter].detach()[:n].clone()
            rates[adapter] = nn.Parameter(kept, requires_grad=rates[adapter].requires_grad)
    config.num_write_lrs = n
