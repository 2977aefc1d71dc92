"""Write more text into a memory that keeps what it holds, with no more device memory than the new text alone needs."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmem_adapter.ops.padding import pad
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.fidelity import recite
from gradmem_adapter.write.loss import Writer
from gradmem_adapter.write.start import start_beside, start_memory

RECITED = 0.9
"""The share of the requested tokens that a memory must recite for them to be rehearsed."""


def start_update(
    writer: Writer, memory: Tensor, known: Tensor, context: Context, limit: int | None
) -> tuple[Tensor, Context]:
    """The memory that WRITE of more text starts from, and the contexts that it writes.

    A few gradient steps on new text alone either erase the old text or fail to write the new. So memory rehearses: it
    writes

        C' = [R; C],    R = the first choices of p(t | [M; R]) as long as memory is sure of them,

    from M on, or from a start that reads contexts (`start_memory`). A memory that does not recite its text writes C,
    from M on, or from a start that leaves the old text a part of the vectors (`start_beside`).

    Args:
        writer (`Writer`): the model.
        memory (`Tensor`): `[B, m, d]`, M.
        known (`Tensor`): `[B]`, how many tokens M was written from.
        context (`Context`): B new contexts, C.
        limit (`int`, *optional*): the most tokens in C'. `None`: twice those of C.

    Returns:
        The memory to start from, `[B, m, d]`, and C or C'.

    Raises:
        ValueError: a start that reads contexts has too few positions for M, C and the new vectors.
    """
    slots, own = writer.config.start == "slots", context.lengths
    most = 2 * own if limit is None else torch.full_like(own, limit)
    if (longest := writer.longest_context(memory.shape[1])) is not None:
        most = most.clamp(max=longest)
    room = (most - own).clamp(min=0)  # per row, so that a row does not depend on its batch
    asked = known.minimum(room) if slots else known.where(known <= room, 0)
    recited = recite(writer, memory, int(asked.max()))
    lengths = recited.lengths.minimum(asked)
    rehearses = (lengths > 0) & (lengths >= RECITED * asked)
    old = [ids[:n] for ids, n in zip(recited.input_ids, lengths * rehearses, strict=True)]
    new = [ids[:n] for ids, n in zip(*context, strict=True)]
    ids, mask = pad([torch.cat(rows) for rows in zip(old, new, strict=True)], "right")
    whole = Context(ids, mask.sum(1))
    if slots:
        return memory, whole
    start, beside = memory.clone(), ~rehearses
    if rehearses.any():
        start[rehearses] = start_memory(writer, Context(*(part[rehearses] for part in whole)))
    if beside.any():
        alone = Context(*(part[beside] for part in context))
        start[beside] = start_beside(writer, memory[beside], known[beside], alone)
    return start, whole
