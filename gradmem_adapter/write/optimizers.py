"""The rules of a write step: from memory and write gradient to the next memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradmem_adapter.write.loss import Writer
from gradmem_adapter.write.rates import Rate


class WriteState(NamedTuple):
    """Where WRITE is.

    Args:
        memory (`Tensor`): `[B, m, d]`.
        buffers (`tuple[Tensor, ...]`): `[B, m, d]` each, what the write optimizer carries from step to step.
        step (`int`): how many steps were taken.
    """

    memory: Tensor
    buffers: tuple[Tensor, ...]
    step: int

    @classmethod
    def start(cls, memory: Tensor, optimizer: str) -> WriteState:
        """Before the first step: buffers are zero."""
        return cls(memory, tuple(torch.zeros_like(memory) for _ in range(OPTIMIZERS[optimizer].buffers)), 0)

    @property
    def tensors(self) -> list[Tensor]:
        """The memory and the buffers."""
        return [self.memory, *self.buffers]


class WriteOptimizer(NamedTuple):
    """The rule of a write step.

    Args:
        buffers (`int`): how many tensors `[B, m, d]` it carries from step to step.
        update (`Callable`): from the state, the clipped write gradient `[B, m, d]` and the learning rate to the next
            state. It is differentiated in meta-training, so it changes nothing in place.
    """

    buffers: int
    update: Callable[[WriteState, Tensor, Rate], WriteState]


def sgd(state: WriteState, gradient: Tensor, lr: Rate) -> WriteState:
    """One write step: M_{k+1} = M_k - a * grad_M L_w(M_k; C)."""
    return state._replace(memory=state.memory - lr * gradient, step=state.step + 1)


def adam(state: WriteState, gradient: Tensor, lr: Rate) -> WriteState:
    """One write step by Adam (Kingma and Ba, 2015, algorithm 1), betas 0.9 and 0.999, per element of the memory."""
    step = state.step + 1
    mean, square = state.buffers
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.999 * square + 0.001 * gradient**2
    # The epsilon is inside the root so that the root has a derivative where a gradient is zero.
    scale = (square / (1 - 0.999**step) + 1e-16).sqrt()
    return WriteState(state.memory - lr * mean / (1 - 0.9**step) / scale, (mean, square), step)


OPTIMIZERS = {"sgd": WriteOptimizer(0, sgd), "adam": WriteOptimizer(2, adam)}
"""The write optimizers by the names that `GradMemConfig.write_optimizer` has for them."""


def write_step(
    writer: Writer, state: WriteState, gradient: Tensor, lr: Rate, optimizer: str | None = None
) -> WriteState:
    """One write step with a gradient [B, m, d] as it came: clipped, then handed to the write optimizer."""
    return OPTIMIZERS[optimizer or writer.config.write_optimizer].update(state, writer.clip(gradient), lr)
