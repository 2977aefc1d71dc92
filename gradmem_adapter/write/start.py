"""Where WRITE starts: at the memory slots, or at the result of a forward pass over the context."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmem_adapter.lora import write_phase
from gradmem_adapter.ops.padding import append, part_means
from gradmem_adapter.utils.backbone import fresh, max_positions, trunk, uses_checkpointing
from gradmem_adapter.utils.wording import counted
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.loss import Writer

MOST_OF_A_SHORT_TEXT = 1 / 4
"""A new text gets one vector per token up to this share of the vectors, however long the old text is. With fewer, the
new text is lost; the old text hardly loses anything (docs/lab/LOG.md)."""


def start_memory(writer: Writer, context: Context) -> Tensor:
    """The memory that WRITE starts from: the slots M_0, or with `start="context"`

        M_0(C) = S + gain * h_S,    [h_C; h_S] = backbone([C; S]),    S = M_0,

    where h are the last hidden states, so that the gradient steps start from what a forward-only writer knows (Bulatov
    et al., 2022). With `start="pooled_context"` the j-th of m equal parts of C, P_j, is averaged into slot j:

        S_j = M_0j + pool_gain * mean(embeddings of P_j).

    Args:
        writer (`Writer`): the model, whose configuration chooses the start.
        context (`Context`): B contexts, C.

    Returns:
        `Tensor`: `[B, m, d]`.

    Raises:
        NotImplementedError: it is trained with gradient checkpointing and a LoRA of one phase.
    """
    slots = writer.slots.gradmem_memory[writer.adapter].expand(len(context.input_ids), -1, -1)
    slots = slots.to(torch.promote_types(slots.dtype, torch.float32))  # the dtype of the gradient steps
    if writer.config.start == "slots":
        return slots
    if writer.config.lora_phase != "both" and torch.is_grad_enabled() and uses_checkpointing(writer.backbone):
        # The outer backward pass recomputes layers in the READ phase, and no hook can change that.
        raise NotImplementedError(
            f"start={writer.config.start!r} cannot be trained with gradient checkpointing and "
            f"lora_phase={writer.config.lora_phase!r}. Use lora_phase='both', or turn gradient checkpointing off."
        )
    return _from_context(writer, context, slots)


def start_beside(writer: Writer, memory: Tensor, known: Tensor, context: Context) -> Tensor:
    """The memory that WRITE of more text starts from, with a start that reads contexts. The m vectors are shared
    between the old text of n tokens and the new text of N in proportion to their lengths, but the new text has one
    vector for each of its first m / 4 tokens: a sentence after a long text would be lost in one or two.

        M_0(C | M) = [means of neighbours in M, m - k of them; S' + gain * h_S'],
        k = max(m N / (n + N), min(N, m / 4)),

    where S' are the other k slots (with the means of parts of C). They keep their trained positions, after the m - k
    means: [.., h_S'] = backbone([M; C; means; S']).

    Args:
        writer (`Writer`): the model.
        memory (`Tensor`): `[B, m, d]`, M.
        known (`Tensor`): `[B]`, n.
        context (`Context`): B new contexts, C.

    Returns:
        `Tensor`: `[B, m, d]`.

    Raises:
        ValueError: [M; C; means; S'] is longer than the model has positions.
    """
    slots = writer.slots.gradmem_memory[writer.adapter].to(memory.dtype)
    _check_beside(writer, memory.shape[1], int(context.lengths.max()))
    before = writer.slots.prefix(memory, "write", writer.adapter)
    started, m = [], len(slots)
    for row, (tokens, length) in enumerate(zip(known.tolist(), context.lengths.tolist(), strict=True)):
        least = max(1, min(length, int(m * MOST_OF_A_SHORT_TEXT)))
        kept = min(round(m * tokens / (tokens + length)), m - least)
        new = Context(context.input_ids[row : row + 1, :length], context.lengths[row : row + 1])
        old, _ = part_means(memory[row : row + 1], new.lengths.new_tensor([memory.shape[1]]), max(kept, 1))
        begun = _from_context(writer, new, slots[None, kept:], before[row : row + 1], old[:, :kept])
        started.append(torch.cat([old[:, :kept], begun], dim=1))
    return torch.cat(started)


def _check_beside(writer: Writer, vectors: int, length: int) -> None:
    longest = writer.longest_update(vectors)
    if longest is not None and length > longest:
        raise ValueError(
            f"A new text has {counted(length, 'token')}, but at most {max(0, longest)} are allowed with "
            f"start={writer.config.start!r} if memory does not recite the old text: old memory, new text and new "
            f"memory are read together, and the model has {max_positions(writer.backbone)} positions. Split the text "
            "and update with one part after the other, or write it separately and join the states with "
            "MemoryState.concat."
        )


def _from_context(
    writer: Writer, context: Context, slots: Tensor, before: Tensor | None = None, between: Tensor | None = None
) -> Tensor:
    """Slots `[B, n, d]` plus their hidden states, read from [before; C; between; slots], each `[B, ., d]`."""
    with write_phase():
        embeddings, lengths = writer.backbone.get_input_embeddings()(context.input_ids), context.lengths
        if writer.config.start == "pooled_context":
            means, _ = part_means(embeddings.to(slots.dtype), lengths, slots.shape[1])
            slots = slots + writer.slots.gradmem_pool_gain[writer.adapter] * means
        if before is not None:
            embeddings = torch.cat([before.to(embeddings.dtype), embeddings], dim=1)
            lengths = lengths + before.shape[1]
        tail = slots if between is None else torch.cat([between, slots], dim=1)
        tokens, places = append(embeddings, lengths, tail.to(embeddings.dtype))
        hidden = trunk(fresh(writer.backbone))(
            inputs_embeds=tokens, use_cache=False, return_dict=True
        ).last_hidden_state
    places = places[:, -slots.shape[1] :, None]
    read = hidden.gather(1, places.expand(-1, -1, hidden.shape[-1])).to(slots.dtype)
    return slots + writer.slots.gradmem_start_gain[writer.adapter] * read
