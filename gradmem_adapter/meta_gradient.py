"""How outer gradients cross a write step: one strategy per class.

A write step is M' = M - a g(M, w) with g = grad_M L_w. Given v = dL_out/dM', its backward needs v - a (dg/dM)^T v for M
and -a (dg/dw)^T v for every trained weight w. With meta_gradient="none" WRITE is a constant and needs no strategy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from .attention import TwiceDifferentiableAttention, require_double_backward
from .lora_phase import backward_in_write
from .token_losses import PLAIN
from .write import Context, Writer, WriteState, rate_at, warn_diverged, write_gradient, write_memory, write_step

RELATIVE_STEP = {torch.float64: 1e-4, torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""The finite difference's step by the type that the backbone computes in; measured in docs/meta_gradient.md."""


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


class Exact:
    """Second order, reverse over reverse: the gradient of the gradient."""

    def pullback(self, step: Step, after: Gradients, losses: Tensor | None) -> Gradients:
        with TwiceDifferentiableAttention():
            gradient, values, _ = write_gradient(step.writer, step.state.memory, step.context, create_graph=True)
            return _vjp([*step.update(gradient), values], [*step.numbers, *step.weights], [*after, losses])


class FirstOrder:
    """The write gradient is a constant: dM'/dM = 1, dM'/da = -g, and weights get nothing from the step itself."""

    def pullback(self, step: Step, after: Gradients, losses: Tensor | None) -> Gradients:
        values = None if losses is None else step.writer.losses(step.state.memory, step.context)[0]
        return _vjp([*step.update(step.gradient), values], [*step.numbers, *step.weights], [*after, losses])


class FiniteDifference:
    """Second order from first-order passes alone: works with fused attention, compiled models, checkpointing.

    With u = (dM'/dg)^T v, and because a Hessian is symmetric, (dg/d(M, w))^T u is the derivative of the ordinary
    gradient of L_w along u. For each sample by itself that is

        [grad_{M,w} L_w(M + t u, w) - grad_{M,w} L_w(M - t u, w)] / 2t

    with t such that the memory vector which moves most moves by RELATIVE_STEP of its length: models normalise each
    vector by itself. The outer gradient c of the write losses takes no pass of its own: each side carries half of it,
    and the mean of the two gradients is the gradient at M up to t^2.
    """

    def pullback(self, step: Step, after: Gradients, losses: Tensor | None) -> Gradients:
        memory, gradient = step.state.memory.detach(), step.gradient.requires_grad_()
        *numbers, u = _vjp(step.update(gradient), [*step.numbers, gradient], after)
        u = torch.zeros_like(memory) if u is None else u
        half = memory.new_zeros(len(memory)) if losses is None else losses / 2

        floor = step.writer.config.memory_init_std  # a memory of zeros has no scale of its own
        lengths = torch.linalg.vector_norm(memory, dim=2).clamp(min=floor)
        speed = (torch.linalg.vector_norm(u, dim=2) / lengths).amax(dim=1)
        t = self._relative_step(step) / speed
        # Without an outer gradient there is no direction: both sides are M then, and weigh nothing.
        offset = t.masked_fill(speed == 0, 0)[:, None, None] * u
        slope = 1 / (2 * t)

        found = torch.zeros_like(memory)
        weights: Gradients = [None] * len(step.weights)
        for rows, signs in self._passes(step):
            side, *more = self._loss_gradients(
                step,
                torch.cat([memory[rows] + sign * offset[rows] for sign in signs]),
                Context(*(torch.cat([part[rows]] * len(signs)) for part in step.context)),
                torch.cat([half[rows] + sign * slope[rows] for sign in signs]),
            )
            if side is not None:
                found[rows] += side.unflatten(0, (len(signs), -1)).sum(0)
            weights = _add(weights, more)
        return [*_add(numbers, [found, None, None, None]), *weights]

    @staticmethod
    def _relative_step(step: Step) -> float:
        if step.writer.config.finite_difference_step is not None:
            return step.writer.config.finite_difference_step
        enabled, autocast_dtype = step.replay.autocast
        return RELATIVE_STEP[autocast_dtype if enabled else step.writer.backbone.dtype]

    @staticmethod
    def _passes(step: Step) -> list[tuple[slice, tuple[int, ...]]]:
        """Which samples and which sides go through the model together: about B at a time, as in the step itself.

        Both sides of a sample in one pass are subtracted in the matrix products' accumulators, before anything is
        rounded to bf16. Where random numbers are drawn each side is a pass of its own, so that both draw the same.
        """
        batch = step.state.memory.shape[0]
        if step.replay.drew:
            return [(slice(0, batch), (1,)), (slice(0, batch), (-1,))]
        middle = (batch + 1) // 2
        return [(slice(start, stop), (1, -1)) for start, stop in ((0, middle), (middle, batch)) if start < stop]

    @staticmethod
    def _loss_gradients(step: Step, memory: Tensor, context: Context, cotangent: Tensor) -> Gradients:
        """Ordinary gradients of sum_b cotangent_b L_w(M_b), for the memory and for the weights."""
        memory = memory.requires_grad_()
        with step.replay():
            losses, _ = differentiable_once(step.writer).losses(memory, context)
            return _vjp([losses], [memory, *step.weights], [cotangent])


def differentiable_once(writer: Writer) -> Writer:
    """The writer for losses that are differentiated once, for memory and weights."""
    return writer if writer.trains_head else replace(writer, once=PLAIN)


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


STRATEGIES: dict[str, MetaGradient] = {
    "exact": Exact(),
    "finite_difference": FiniteDifference(),
    "first_order": FirstOrder(),
}


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
        ctx.replay = Replay(memory.device)
        with torch.enable_grad():
            once = replace(writer, once=PLAIN)  # for the memory alone
            gradient, losses, _ = write_gradient(once, memory.detach().requires_grad_(), context)
        ctx.replay.end()
        state = write_step(writer, WriteState(memory, mean, square, step), gradient, lr)
        ctx.save_for_backward(memory, mean, square, lr, gradient, *weights)
        return state.memory, state.mean, state.square, losses.detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, gradient = ctx.saved_tensors[:5]
        memory, mean, square, lr = (tensor.detach().requires_grad_() for tensor in tensors)
        state = WriteState(memory, mean, square, ctx.step)
        step = Step(ctx.writer, ctx.context, state, lr, gradient.detach(), ctx.saved_tensors[5:], ctx.replay)
        # In this thread and inside WRITE throughout, also where a backward pass computes layers again.
        with ctx.replay(), torch.enable_grad(), backward_in_write():
            return None, None, None, None, *ctx.strategy.pullback(step, cotangents[:3], cotangents[3])


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


def differentiable_write(
    writer: Writer, memory: Tensor, context: Context, *, steps: int, lrs: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """WRITE on the tape: `steps` write steps that the outer loss is differentiated through.

    Args:
        memory: [B, m, d], the memory slots for each sample.
        context: B contexts.
        steps: K, from 0.
        lrs: [n] or [n, m, d], the write learning rates of the first n steps; later ones use the last.
        weights: the trained parameters that WRITE runs through.

    Returns:
        memory [B, m, d] and losses [B, K], before each step; or [B, 1], that of the memory WRITE starts from,
        where it starts from the context, K=0 and there is a reconstruction weight.
    """
    config = writer.config
    start_recites = not steps and config.reconstruction_weight > 0 and config.start_from_context
    if config.meta_gradient == "none" or not torch.is_grad_enabled():
        optimizer = config.write_optimizer
        constant, history, diverged = write_memory(
            writer, memory, context, steps=steps, lrs=lrs.unbind(), optimizer=optimizer
        )
        warn_diverged(diverged)
        return constant, history if start_recites else history[:, :-1]
    if config.meta_gradient == "exact":
        require_double_backward(writer.backbone)
    first_order_steps = 0 if config.second_order_steps is None else steps - config.second_order_steps
    rates = lrs.unbind()
    state, losses = WriteState.start(memory), []
    for k in range(steps):
        strategy = STRATEGIES["first_order" if k < first_order_steps else config.meta_gradient]
        *tensors, before = _WriteStep.apply(strategy, writer, context, k, *state[:3], rate_at(rates, k), *weights)
        state = WriteState(tensors[0], tensors[1], tensors[2], k + 1)
        losses.append(before)
    if start_recites:
        losses.append(differentiable_once(writer).losses(memory, context)[0])
    return state.memory, torch.stack(losses, dim=1) if losses else memory.new_zeros(len(memory), 0)
