"""What a meta-gradient strategy is: how outer gradients cross one write step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from gradmem_adapter.write.context import Context
from gradmem_adapter.write.loss import Writer
from gradmem_adapter.write.optimizers import WriteState, write_step


@dataclass
class Step:
    """A write step as it was taken: what a strategy needs to pull outer gradients back through it."""

    writer: Writer
    context: Context
    state: WriteState
    """The state before the step, leaves of this step's own graph."""
    lr: Tensor
    gradient: Tensor
    """The write gradient [B, m, d] of the forward pass, before clipping."""
    weights: Sequence[Tensor]
    replay: Replay

    def update(self, gradient: Tensor) -> list[Tensor]:
        """The memory after the step, and Adam's two averages."""
        return list(write_step(self.writer, self.state, gradient, self.lr)[:3])

    @property
    def numbers(self) -> list[Tensor]:
        """What the update reads beside the gradient: memory, Adam's two averages, the learning rate."""
        return [*self.state[:3], self.lr]


Gradients: TypeAlias = Sequence[Tensor | None]
"""Outer gradients, None for zero."""


class MetaGradient(Protocol):
    """How outer gradients cross a write step."""

    def pullback(self, step: Step, after: Gradients, losses: Tensor | None) -> Gradients:
        """The outer gradients for `[*step.numbers, *step.weights]`.

        Args:
            step: the step, inside WRITE and under the random state that it was taken with.
            after: the outer gradient v for the memory after the step, and for Adam's two averages.
            losses: [B], the outer gradient for the write losses before the step; None is zero.
        """


def _vjp(outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], cotangents: Gradients) -> Gradients:
    """The gradients of those outputs that have one, for the inputs."""
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and cotangent is not None and output.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    return torch.autograd.grad(
        [output for output, _ in pairs], inputs, [cotangent for _, cotangent in pairs], allow_unused=True
    )


def _add(first: Gradients, second: Gradients) -> Gradients:
    return [b if a is None else a if b is None else a + b for a, b in zip(first, second, strict=True)]


class Replay:
    """Runs a computation again under the autocast and random state of the first time (dropout draws the same mask)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        # A CUDA graph has no random state that could be read while it is captured.
        self.fixed = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self.state = None if self.fixed else self._random_state()
        self.drew = False
        """Whether the first time drew random numbers."""

    def _random_state(self) -> tuple[Tensor, list[int], list[Tensor]]:
        return torch.get_rng_state(), *get_device_states(torch.empty(0, device=self.device))

    def end(self) -> None:
        """The first time is over."""
        if self.state is not None:
            now = self._random_state()
            pairs = [(self.state[0], now[0]), *zip(self.state[2], now[2], strict=True)]
            self.drew = not all(torch.equal(before, after) for before, after in pairs)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        enabled, dtype = self.autocast
        with torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
            if self.state is None:
                yield
                return
            cpu, devices, states = self.state
            with torch.random.fork_rng(devices, device_type=self.device.type) if devices else torch.random.fork_rng([]):
                torch.set_rng_state(cpu)
                set_device_states(devices, states, device_type=self.device.type)
                yield
