"""How outer gradients cross a write step: one strategy per class.

A write step is M' = M - a g(M, w) with g = grad_M L_w. Given v = dL_out/dM', its backward needs v - a (dg/dM)^T v for M
and -a (dg/dw)^T v for every trained weight w. With meta_gradient="none" WRITE is a constant and needs no strategy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from .attention import TwiceDifferentiableAttention, require_double_backward
from .lora_phase import backward_in_write
from .write import UPDATES, Context, Writer, WriteState, write_gradient, write_memory


@dataclass
class Step:
    """A write step as it was taken: what a strategy needs to pull outer gradients back through it."""

    writer: Writer
    context: Context
    state: WriteState
    """The state before the step, leaves of this step's own graph."""
    lr: Tensor
    gradient: Tensor
    """The write gradient [B, m, d] of the forward pass."""
    weights: Sequence[Tensor]

    def update(self, gradient: Tensor) -> WriteState:
        return UPDATES[self.writer.config.write_optimizer](self.state, gradient, self.lr)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.state.memory, self.state.mean, self.state.square, self.lr, *self.weights]


class MetaGradient(Protocol):
    """How outer gradients cross a write step."""

    def pullback(self, step: Step, after: Sequence[Tensor | None], losses: Tensor | None) -> Sequence[Tensor | None]:
        """Gradients for `step.inputs`.

        Args:
            step: the step, taken again under the same random state, inside WRITE.
            after: the outer gradient v for the memory after the step, and for Adam's two averages; None is zero.
            losses: [B], the outer gradient for the write losses before the step; None is zero.
        """


class Exact:
    """Second order, reverse over reverse: the gradient of the gradient."""

    def pullback(self, step: Step, after: Sequence[Tensor | None], losses: Tensor | None) -> Sequence[Tensor | None]:
        with TwiceDifferentiableAttention():
            gradient, values, _ = write_gradient(step.writer, step.state.memory, step.context, create_graph=True)
            return _gradients(step, [*step.update(gradient)[:3], values], [*after, losses])


class FirstOrder:
    """The write gradient is a constant: dM'/dM = 1, dM'/da = -g, and weights get nothing from the step itself."""

    def pullback(self, step: Step, after: Sequence[Tensor | None], losses: Tensor | None) -> Sequence[Tensor | None]:
        values = None if losses is None else step.writer.losses(step.state.memory, step.context)[0]
        return _gradients(step, [*step.update(step.gradient)[:3], values], [*after, losses])


def _gradients(
    step: Step, outputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The gradients of the outputs that have one for the inputs of the step."""
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and cotangent is not None and output.requires_grad
    ]
    if not pairs:
        return [None] * len(step.inputs)
    return torch.autograd.grad(
        [output for output, _ in pairs], step.inputs, [cotangent for _, cotangent in pairs], allow_unused=True
    )


STRATEGIES: dict[str, MetaGradient] = {"exact": Exact(), "first_order": FirstOrder()}


class _WriteStep(torch.autograd.Function):
    """One write step on the tape. Between forward and backward it keeps its input state and its gradient alone (a few
    times m x d numbers a sample), so that training costs the memory of one step, whatever their number."""

    @staticmethod
    def forward(
        ctx: Any, strategy: MetaGradient, writer: Writer, context: Context, step: int, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        memory, mean, square, lr, *weights = inputs
        ctx.set_materialize_grads(False)
        ctx.strategy, ctx.writer, ctx.context, ctx.step = strategy, writer, context, step
        ctx.replay = _Replay(memory.device)
        with torch.enable_grad():
            gradient, losses, _ = write_gradient(writer, memory.detach().requires_grad_(), context)
        state = UPDATES[writer.config.write_optimizer](WriteState(memory, mean, square, step), gradient, lr)
        ctx.save_for_backward(memory, mean, square, lr, gradient, *weights)
        return state.memory, state.mean, state.square, losses.detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, gradient = ctx.saved_tensors[:5]
        memory, mean, square, lr = (tensor.detach().requires_grad_() for tensor in tensors)
        state = WriteState(memory, mean, square, ctx.step)
        step = Step(ctx.writer, ctx.context, state, lr, gradient, ctx.saved_tensors[5:])
        # In this thread and inside WRITE throughout, also where a backward pass computes layers again.
        with ctx.replay(), torch.enable_grad(), backward_in_write():
            return None, None, None, None, *ctx.strategy.pullback(step, cotangents[:3], cotangents[3])


class _Replay:
    """Runs a computation again under the autocast and random state of the first time (dropout draws the same mask)."""

    def __init__(self, device: torch.device) -> None:
        self.device_type = device.type
        self.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        self.random = torch.get_rng_state()
        self.devices, self.device_random = get_device_states(torch.empty(0, device=device))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        fork = (
            torch.random.fork_rng(self.devices, device_type=self.device_type)
            if self.devices
            else torch.random.fork_rng([])
        )
        enabled, dtype = self.autocast
        with fork, torch.autocast(self.device_type, dtype=dtype, enabled=enabled):
            torch.set_rng_state(self.random)
            set_device_states(self.devices, self.device_random, device_type=self.device_type)
            yield


def differentiable_write(
    writer: Writer, memory: Tensor, context: Context, *, steps: int, lr: Tensor | float, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """WRITE on the tape: `steps` write steps that the outer loss is differentiated through.

    Args:
        memory: [B, m, d], the memory slots for each sample.
        context: B contexts.
        steps: K, from 0.
        lr: the write learning rate; a tensor where it is learned.
        weights: the trained parameters that WRITE runs through.

    Returns:
        memory [B, m, d] and losses [B, K], before each step.
    """
    config = writer.config
    if config.meta_gradient == "none" or not torch.is_grad_enabled():
        fixed_lr = lr.item() if isinstance(lr, Tensor) else lr
        optimizer = config.write_optimizer
        constant, history = write_memory(writer, memory, context, steps=steps, lr=fixed_lr, optimizer=optimizer)
        return constant, history[:, :-1]
    exact_steps = 0
    if config.meta_gradient == "exact":
        require_double_backward(writer.backbone)
        exact_steps = steps if config.second_order_steps is None else config.second_order_steps
    lr = torch.as_tensor(lr, dtype=memory.dtype, device=memory.device)
    state, losses = WriteState.start(memory), []
    for k in range(steps):
        strategy = STRATEGIES["exact" if k >= steps - exact_steps else "first_order"]
        *tensors, before = _WriteStep.apply(strategy, writer, context, k, *state[:3], lr, *weights)
        state = WriteState(tensors[0], tensors[1], tensors[2], k + 1)
        losses.append(before)
    return state.memory, torch.stack(losses, dim=1) if losses else memory.new_zeros(len(memory), 0)
