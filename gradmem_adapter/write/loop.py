"""WRITE: the loop over write steps, with no graph kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradmem_adapter.outputs import WriteProgress
from gradmem_adapter.utils.wording import counted, number_of
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.loss import Pass, Writer, write_pass
from gradmem_adapter.write.optimizers import OPTIMIZERS
from gradmem_adapter.write.options import WriteOptions
from gradmem_adapter.write.rates import Rate, rate_at, write_lrs
from gradmem_adapter.write.start import start_memory
from gradmem_adapter.write.step import write_step

RunPass: TypeAlias = Callable[[Tensor, Context, bool, bool], Pass]
"""`write_pass` for one writer: memory `[B, m, d]`, contexts, and whether to return the gradient and the share
recovered."""


class Written(NamedTuple):
    """The result of WRITE.

    Args:
        memory (`Tensor`): `[B, m, d]`, M_K.
        losses (`Tensor`): `[B, steps + 1]`, before each step and after the last one that ran for any sample.
        diverged (`Tensor`): `[B, steps + 1]`, True at the first loss of a sample that is not finite, for
            `warn_diverged`.
    """

    memory: Tensor
    losses: Tensor
    diverged: Tensor


def write_contexts(
    writer: Writer,
    context: Context,
    options: WriteOptions,
    initial: Tensor | None = None,
    callback: Callable[[WriteProgress], None] | None = None,
    run: RunPass | None = None,
    more: bool = False,
    rows: int | None = None,
) -> Written:
    """WRITE contexts, from the configured start or from an earlier memory.

    Args:
        writer (`Writer`): the model.
        context (`Context`): B contexts.
        options (`WriteOptions`): how to write them.
        initial (`Tensor`, *optional*): `[B, m, d]`, a memory to continue from.
        callback (`Callable`, *optional*): called at each step.
        run (`RunPass`, *optional*): a faster `write_pass`.
        more (`bool`, *optional*, defaults to `False`): `initial` does not hold all of these contexts yet, so the
            learning rates start with the first step's again.
        rows (`int`, *optional*): how many contexts are read at a time to find the start. `None`: all.
    """
    memory = initial
    if memory is None:
        with torch.no_grad():
            parts = context.split(rows or len(context.input_ids))
            memory = torch.cat([start_memory(writer, part) for part in parts])
    lrs: Sequence[Rate] = [options.lr] if options.lr is not None else []
    if not lrs:
        # Further steps on an earlier memory use the rates of late steps.
        taken = 0 if initial is None or more else writer.config.num_write_lrs
        steps = writer.config.write_steps if options.steps is None else options.steps
        lrs = write_lrs(writer.slots, writer.adapter, writer.config, steps, taken).detach().unbind()
    wide = memory.to(torch.promote_types(memory.dtype, torch.float32))
    return write_memory(writer, wide, context, lrs, options, callback, run)


def write_memory(
    writer: Writer,
    memory: Tensor,
    context: Context,
    lrs: Sequence[Rate],
    options: WriteOptions,
    callback: Callable[[WriteProgress], None] | None = None,
    run: RunPass | None = None,
) -> Written:
    """The loop over write steps, from M_0 to M_K, with no graph kept.

    A sample stops early, at the best of its last two memories, when a step lowered its loss by less than the tolerance
    times the loss, when every token is recovered (if asked for), or when its loss is no longer finite. The others go
    on. The loop waits for a GPU only if samples may stop.

    Args:
        writer (`Writer`): the model.
        memory (`Tensor`): `[B, m, d]`, the start, M_0.
        context (`Context`): B contexts, C.
        lrs (`Sequence`): a, the write learning rates of the first steps; later steps use the last rate.
        options (`WriteOptions`): how to write them; its learning rate is ignored.
        callback (`Callable`, *optional*): called at each step.
        run (`RunPass`, *optional*): a faster `write_pass`.
    """
    steps = writer.config.write_steps if options.steps is None else options.steps
    optimizer = options.optimizer or writer.config.write_optimizer
    tolerance = options.tolerance
    run = run or partial(write_pass, writer)
    may_stop = tolerance is not None or options.stop_when_recovered
    wants_recovered = options.stop_when_recovered or callback is not None
    with torch.inference_mode(False), torch.enable_grad():
        # Clones: tensors made under inference_mode cannot take part in autograd, clones made outside it can.
        context = Context(context.input_ids.clone(), context.lengths.clone())
        state = OPTIMIZERS[optimizer].start(memory.detach().clone())
        active = torch.ones(len(memory), dtype=torch.bool, device=memory.device)
        # The result for a sample: its memory at the last loss that counted.
        kept, kept_loss = state.memory, torch.full((len(memory),), math.inf, device=memory.device)
        history: list[Tensor] = []
        diverged: list[Tensor] = []
        for step in range(steps + 1):
            if step == steps and not options.last_loss:
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
                if options.stop_when_recovered:
                    active = active & (recovered < 1)
            # Reading `active` waits for the GPU, so it is read only where samples may stop.
            if gradient is None or (may_stop and not active.any()):
                break
            state = write_step(writer.config, state, gradient, rate_at(lrs, step), optimizer)
        return Written(kept, torch.stack(history, dim=1), torch.stack(diverged, dim=1))


def warn_diverged(diverged: Tensor) -> None:
    """Warn about samples whose loss became non-finite, and at which step.

    Args:
        diverged (`Tensor`): `[B, steps + 1]`, as in `Written`.
    """
    if not diverged.any():
        return
    for step, samples in enumerate(diverged.cpu().unbind(1)):
        if samples.any():
            names = ", ".join(str(i) for i in sorted(map(number_of, samples.nonzero().flatten().tolist())))
            warnings.warn(
                f"The write loss of sample {names} is not finite after {counted(step, 'step')}. Its memory from before "
                "that step, the last with a finite loss, is kept. Use a lower write learning rate, or write_clip_norm.",
                RuntimeWarning,
                stacklevel=3,
            )
