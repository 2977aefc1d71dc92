"""The interface of write optimizers: the rule that turns a write gradient into the next memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from gradmem_adapter.write.rates import Rate


class WriteState(NamedTuple):
    """The state of WRITE between two steps.

    Args:
        memory (`Tensor`): `[B, m, d]`.
        buffers (`tuple[Tensor, ...]`): `[B, m, d]` each, what the write optimizer keeps from step to step.
        step (`int`): how many steps have been taken.
    """

    memory: Tensor
    buffers: tuple[Tensor, ...]
    step: int

    @property
    def tensors(self) -> list[Tensor]:
        """The memory and the buffers."""
        return [self.memory, *self.buffers]


class WriteOptimizer(ABC):
    """The rule of a write step. One object serves all models, so it keeps no state of its own.

    Attributes:
        buffers (`int`): how many tensors `[B, m, d]` the rule keeps from step to step.
    """

    buffers: int = 0

    def start(self, memory: Tensor) -> WriteState:
        """The state before the first step: a memory `[B, m, d]`, and buffers of zeros."""
        return WriteState(memory, tuple(torch.zeros_like(memory) for _ in range(self.buffers)), 0)

    @abstractmethod
    def update(self, state: WriteState, gradient: Tensor, lr: Rate) -> WriteState:
        """Take one step. Meta-training differentiates it, so it must not modify anything in place.

        Args:
            state (`WriteState`): the state before the step.
            gradient (`Tensor`): `[B, m, d]`, the write gradient, clipped as configured.
            lr (`Tensor` or `float`): the write learning rate, one number or `[m, d]`.

        Returns:
            `WriteState`: the state after the step, with as many buffers.
        """
