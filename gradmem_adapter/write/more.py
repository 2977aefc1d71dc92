"""More text into a memory that keeps what it knew, in the memory that the new text alone takes."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmem_adapter.ops.padding import pad
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.fidelity import recite
from gradmem_adapter.write.loss import Writer
from gradmem_adapter.write.start import start_beside, start_memory

RECITED = 0.9
"""The share of the tokens it is asked for that a memory must recite to rehearse them."""


def more_text(
    writer: Writer, memory: Tensor, known: Tensor, context: Context, limit: int | None
) -> tuple[Tensor, Context]:
    """What WRITE of more text starts from, and what it writes.

    A few gradient steps on new text alone cost a memory the old, or cannot write the new. So it rehearses: it writes

        C' = [R; C],    R = the first choices of p(t | [M; R]) as long as memory is sure of them,

    from M on, or from a start that reads contexts (`start_memory`). A memory that does not recite its text writes C,
    from M on, or from a start that gives the old text a part of the vectors (`start_beside`).

    Args:
        writer (`Writer`): the model.
        memory (`Tensor`): `[B, m, d]`, M.
        known (`Tensor`): `[B]`, how many tokens it was written from.
        context (`Context`): B new contexts, C.
        limit (`int`, *optional*): most tokens of C'. `None`: twice those of the longest C.

    Returns:
        `[B, m, d]`, and C or C'.
    """
    slots, longest = writer.config.start == "slots", context.input_ids.shape[1]
    limit = min(limit or 2 * longest, writer.longest_context or limit or 2 * longest)
    room = max(0, limit - longest)
    asked = known.clamp(max=room) if slots else known
    if not (asked <= room).any():
        return start_beside(writer, memory, known, context), context
    recited = recite(writer, memory, min(int(known.max()), room))
    rehearses = recited.lengths >= RECITED * asked
    old = [ids[:n] for ids, n in zip(recited.input_ids, recited.lengths * rehearses, strict=True)]
    new = [ids[:n] for ids, n in zip(*context, strict=True)]
    ids, mask = pad([torch.cat(rows) for rows in zip(old, new, strict=True)], "right")
    whole = Context(ids, mask.sum(1))
    if slots:
        return memory, whole
    beside = start_beside(writer, memory, known, context)
    return torch.where(rehearses[:, None, None], start_memory(writer, whole), beside), whole
