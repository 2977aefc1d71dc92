"""WRITE: the loop over write steps, with no graph kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from gradmem_adapter.ops.cross_entropy import FUSED
from gradmem_adapter.outputs import WriteProgress
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.loss import Writer, write_gradient
from gradmem_adapter.write.optimizers import WriteState, write_step
from gradmem_adapter.write.rates import Rate, rate_at

WritePass: TypeAlias = Callable[[Tensor, Context, bool, bool], tuple[Tensor | None, Tensor, Tensor | None]]
"""`write_pass` for one writer: memory [B, m, d], contexts, whether the gradient and `recovered` are wanted."""


def write_pass(
    writer: Writer, memory: Tensor, context: Context, gradient: bool, recovered: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """What one step of WRITE needs to know of a memory, with no graph kept.

    Returns:
        the write gradient [B, m, d] (None unless `gradient`), losses [B] and recovered [B] (None unless `recovered`).
    """
    writer = replace(writer, fused=writer.fused or FUSED)
    if gradient:
        leaf = memory.detach().requires_grad_()
        slope, losses, share = write_gradient(writer, leaf, context, recovered=recovered)
        return slope, losses.detach(), share
    with torch.no_grad():
        return None, *writer.losses(memory, context, recovered)


def write_memory(
    writer: Writer,
    memory: Tensor,
    context: Context,
    *,
    steps: int,
    lrs: Sequence[Rate],
    optimizer: str,
    tolerance: float | None = None,
    stop_when_recovered: bool = False,
    last_loss: bool = True,
    callback: Callable[[WriteProgress], None] | None = None,
    run: WritePass | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """WRITE: `steps` write steps from `memory`, with no graph kept.

    A sample stops early, at the best of its last two memories, when a step lowered its loss by less than `tolerance`
    times the loss, when every token is recovered (if asked for), or when its loss is no longer finite. The others go
    on. On a GPU nothing is waited for unless samples may stop.

    Args:
        memory: [B, m, d], where to start.
        context: B contexts.
        lrs: write learning rates of the first steps; later ones use the last.
        last_loss: False spares the forward pass over what the last step wrote, whose loss is NaN then.
        run: a faster `write_pass`.

    Returns:
        memory [B, m, d]; losses [B, steps + 1], before each step and after the last that was run for any sample; and
        diverged [B, steps + 1], True where a sample's loss was first not finite, for `warn_diverged`.
    """
    run = run or partial(write_pass, writer)
    may_stop = tolerance is not None or stop_when_recovered
    wants_recovered = stop_when_recovered or callback is not None
    with torch.inference_mode(False), torch.enable_grad():
        # Clones: tensors made under inference_mode cannot take part in autograd, clones made outside it can.
        context = Context(context.input_ids.clone(), context.lengths.clone())
        state = WriteState.start(memory.detach().clone(), optimizer)
        active = torch.ones(len(memory), dtype=torch.bool, device=memory.device)
        # What a sample keeps: its memory at the last loss that counted.
        kept, kept_loss = state.memory, torch.full((len(memory),), math.inf, device=memory.device)
        history: list[Tensor] = []
        diverged: list[Tensor] = []
        for step in range(steps + 1):
            if step == steps and not last_loss:
                written = active & state.memory.isfinite().all(dim=2).all(dim=1)
                kept = torch.where(written[:, None, None], state.memory, kept)
                history.append(torch.full_like(kept_loss, math.nan))
                diverged.append(active & ~written)
                break
            gradient, losses, recovered = run(state.memory, context, step < steps, wants_recovered)
            losses = losses.float()
            finite = losses.isfinite()
            diverged.append(active & ~finite)
            better = finite if tolerance is None else finite & (losses <= kept_loss)
            stalled = torch.zeros_like(active) if tolerance is None else losses > kept_loss * (1 - tolerance)
            kept = torch.where((active & better)[:, None, None], state.memory, kept)
            kept_loss = torch.where(active & better, losses, kept_loss)
            active = active & finite & ~stalled
            history.append(kept_loss)
            if recovered is not None:
                if callback is not None:
                    callback(WriteProgress(step, steps, kept_loss, recovered.float()))
                if stop_when_recovered:
                    active = active & (recovered < 1)
            # Reading `active` waits for the GPU, so it is read only where samples may stop.
            if gradient is None or (may_stop and not active.any()):
                break
            state = write_step(writer, state, gradient, rate_at(lrs, step), optimizer)
        return kept, torch.stack(history, dim=1), torch.stack(diverged, dim=1)


_names: ContextVar[Sequence[int] | None] = ContextVar("gradmem_sample_names", default=None)


@contextmanager
def sample_names(names: Sequence[int]) -> Iterator[None]:
    """Warnings about samples inside call them by these numbers, not by their places in the batch."""
    token = _names.set(names)
    try:
        yield
    finally:
        _names.reset(token)


def warn_diverged(diverged: Tensor) -> None:
    """Name the samples and steps at which losses were no longer finite. Args: as `write_memory` returns it."""
    if not diverged.any():
        return
    called = _names.get() or range(len(diverged))
    for step, samples in enumerate(diverged.cpu().unbind(1)):
        if samples.any():
            names = ", ".join(str(i) for i in sorted(called[j] for j in samples.nonzero().flatten().tolist()))
            warnings.warn(
                f"WRITE: the write loss of sample {names} is not finite after {step} steps; its memory is the one "
                "before, the last with a finite loss. Use a lower write learning rate, or write_clip_norm.",
                RuntimeWarning,
                stacklevel=3,
            )
