"""Rehearsal: more text into a memory that keeps what it knew, however long the whole text is."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmem_adapter.ops.padding import pad
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.fidelity import recite
from gradmem_adapter.write.loss import Writer


def rehearsed(writer: Writer, memory: Tensor, context: Context, room: int) -> Context:
    """New contexts behind what memories recite of the old ones, to be written together:

        C' = [R; C],    R = the first choices of p(t | [M; R]) as long as memory is sure of them.

    Written over, a memory forgets: a few gradient steps on new text alone cost it the old. So it learns both anew.

    Args:
        writer (`Writer`): the model.
        memory (`Tensor`): `[B, m, d]`, M.
        context (`Context`): B new contexts, C.
        room (`int`): most tokens of R.
    """
    recited = recite(writer, memory, room)
    old, new = ([ids[:n] for ids, n in zip(*rows, strict=True)] for rows in (recited, context))
    ids, mask = pad([torch.cat(rows) for rows in zip(old, new, strict=True)], "right")
    return Context(ids, mask.sum(1))
