"""WRITE on the tape: write steps that the outer loss is differentiated through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from gradmem_adapter.lora import backward_in_write
from gradmem_adapter.meta_gradients import STRATEGIES
from gradmem_adapter.meta_gradients.base import MetaGradient, Step, differentiated_once
from gradmem_adapter.meta_gradients.replay import Replay
from gradmem_adapter.ops.cross_entropy import FUSED
from gradmem_adapter.utils.kinds import check_kind
from gradmem_adapter.utils.parameters import constant
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.loop import warn_diverged, write_memory
from gradmem_adapter.write.loss import Writer, write_gradient
from gradmem_adapter.write.optimizers import OPTIMIZERS, WriteState
from gradmem_adapter.write.options import WriteOptions
from gradmem_adapter.write.rates import rate_at, write_lrs
from gradmem_adapter.write.start import start_memory
from gradmem_adapter.write.step import write_step


class _WriteStep(torch.autograd.Function):
    """One write step on the tape. Between forward and backward it keeps only its input state and its gradient (a few
    times m x d numbers per sample), so training needs the memory of one step, however many there are."""

    @staticmethod
    def forward(
        ctx: Any, strategy: MetaGradient, writer: Writer, context: Context, buffers: int, step: int, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """`inputs` are the memory, the write optimizer's buffers, the learning rate and the trained weights."""
        memory, *carried = inputs[: 1 + buffers]
        lr = inputs[1 + buffers]
        ctx.set_materialize_grads(False)
        ctx.strategy, ctx.writer, ctx.context, ctx.buffers, ctx.step = strategy, writer, context, buffers, step
        ctx.replay = Replay(memory.device)
        with torch.enable_grad(), constant(inputs[2 + buffers :]):
            fused = replace(writer, fused=FUSED)
            gradient, losses, _ = write_gradient(fused, memory.detach().requires_grad_(), context)
        ctx.replay.end()
        state = write_step(writer.config, WriteState(memory, tuple(carried), step), gradient, lr)
        ctx.save_for_backward(gradient, *inputs)
        return losses.detach(), *state.tensors

    @staticmethod
    def backward(ctx: Any, losses: Tensor | None, *after: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, *inputs = ctx.saved_tensors
        *tensors, lr = (tensor.detach().requires_grad_() for tensor in inputs[: 2 + ctx.buffers])
        state = WriteState(tensors[0], tuple(tensors[1:]), ctx.step)
        weights = inputs[2 + ctx.buffers :]
        step = Step(ctx.writer, ctx.context, state, lr, gradient.detach(), weights, ctx.replay)
        # Stays in this thread and inside WRITE, even where a backward pass recomputes layers.
        with ctx.replay(), torch.enable_grad(), backward_in_write():
            return *[None] * 5, *ctx.strategy.pullback(step, after, losses)


def differentiable_write(
    writer: Writer, context: Context, steps: int | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """WRITE on the tape: write steps that the outer loss is differentiated through.

    Args:
        writer (`Writer`): the model, and the configuration that names the strategy.
        context (`Context`): B contexts.
        steps (`int`, *optional*): K, 0 or more. `None`: the configured number.
        weights (`Sequence[Tensor]`): the trained parameters that WRITE runs through.

    Returns:
        The memory `[B, m, d]` and write losses `[B, K]`, before each step. With K=0, a start from the context and a
        reconstruction weight: `[B, 1]`, the loss of the memory that WRITE starts from.

    Raises:
        ValueError: K is negative.
    """
    config = writer.config
    check_kind("write_steps", steps, SupportsIndex | None, "a number of steps")
    steps = config.write_steps if steps is None else steps
    if steps < 0:
        raise ValueError(f"write_steps must be a non-negative integer, got {steps}.")
    rates = write_lrs(writer.slots, writer.adapter, config, steps).unbind()
    memory = start_memory(writer, context)
    start_recites = not steps and config.reconstruction_weight > 0 and config.start != "slots"
    if config.meta_gradient == "none" or not torch.is_grad_enabled():
        options = WriteOptions(steps=steps, last_loss=start_recites)
        constants = [rate.detach() for rate in rates]
        written, history, diverged = write_memory(writer, memory, context, constants, options)
        warn_diverged(diverged)
        return written, history if start_recites else history[:, :-1]
    chosen = STRATEGIES[config.meta_gradient]
    chosen.check(writer.backbone)
    first_order_steps = 0 if config.second_order_steps is None else steps - config.second_order_steps
    state, losses = OPTIMIZERS[config.write_optimizer].start(memory), []
    for k in range(steps):
        strategy = STRATEGIES["first_order"] if k < first_order_steps else chosen
        inputs = [*state.tensors, rate_at(rates, k), *weights]
        before, after, *buffers = _WriteStep.apply(strategy, writer, context, len(state.buffers), k, *inputs)
        state = WriteState(after, tuple(buffers), k + 1)
        losses.append(before)
    if start_recites:
        losses.append(differentiated_once(writer).losses(memory, context)[0])
    return state.memory, torch.stack(losses, dim=1) if losses else memory.new_zeros(len(memory), 0)
