"""WRITE on the tape: write steps that the outer loss is differentiated through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradmem_adapter.lora import backward_in_write
from gradmem_adapter.meta_gradients.base import MetaGradient, Replay, Step
from gradmem_adapter.meta_gradients.exact import Exact
from gradmem_adapter.meta_gradients.finite_difference import FiniteDifference, differentiable_once
from gradmem_adapter.meta_gradients.first_order import FirstOrder
from gradmem_adapter.ops.attention import require_double_backward
from gradmem_adapter.ops.cross_entropy import PLAIN
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.loop import warn_diverged, write_memory
from gradmem_adapter.write.loss import Writer, write_gradient
from gradmem_adapter.write.optimizers import WriteState, rate_at, write_step

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
