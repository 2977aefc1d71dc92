"""The rules of a write step: from memory and write gradient to the next memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradmem_adapter.write.loss import Writer

Rate: TypeAlias = Tensor | float
"""A write learning rate: a number, or one for each element of the memory [m, d]."""


class WriteState(NamedTuple):
    """The memory [B, m, d] and what the write optimizer carries from step to step (zeros for sgd)."""

    memory: Tensor
    mean: Tensor
    square: Tensor
    step: int

    @classmethod
    def start(cls, memory: Tensor) -> WriteState:
        return cls(memory, torch.zeros_like(memory), torch.zeros_like(memory), 0)


def sgd(state: WriteState, gradient: Tensor, lr: Rate) -> WriteState:
    """One write step: M_{k+1} = M_k - a * grad_M L_w(M_k; C)."""
    return state._replace(memory=state.memory - lr * gradient, step=state.step + 1)


def adam(state: WriteState, gradient: Tensor, lr: Rate) -> WriteState:
    """One write step by Adam (Kingma and Ba, 2015, algorithm 1), betas 0.9 and 0.999, per element of the memory."""
    step = state.step + 1
    mean = 0.9 * state.mean + 0.1 * gradient
    square = 0.999 * state.square + 0.001 * gradient**2
    # The epsilon is inside the root so that the root has a derivative where a gradient is zero.
    scale = (square / (1 - 0.999**step) + 1e-16).sqrt()
    return WriteState(state.memory - lr * mean / (1 - 0.9**step) / scale, mean, square, step)


_UPDATES: dict[str, Callable[[WriteState, Tensor, Tensor | float], WriteState]] = {"sgd": sgd, "adam": adam}


def write_step(
    writer: Writer, state: WriteState, gradient: Tensor, lr: Rate, optimizer: str | None = None
) -> WriteState:
    """One write step with a gradient [B, m, d] as it came: clipped, then handed to the write optimizer."""
    return _UPDATES[optimizer or writer.config.write_optimizer](state, writer.clip(gradient), lr)


def rate_at(lrs: Sequence[Rate], step: int) -> Rate:
    """The write learning rate of a step: its own, or the last where there are fewer."""
    return lrs[min(step, len(lrs) - 1)]
