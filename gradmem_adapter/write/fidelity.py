"""How much of its context a memory state holds, decoded as in WRITE: with its head, control vectors and LoRA."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from gradmem_adapter.lora import write_phase
from gradmem_adapter.ops.output_head import output_head
from gradmem_adapter.outputs import Fidelity
from gradmem_adapter.utils.backbone import first_position, fresh, trunk
from gradmem_adapter.write.context import Context
from gradmem_adapter.write.loss import Writer

CONFIDENT = 0.25
"""The least probability of a token that memory is sure of. A memory that cannot recite gives its first tokens less."""


@torch.no_grad()
def reconstruct(
    writer: Writer, memory: Tensor, length: int, callback: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Decode contexts greedily from memory alone.

    Args:
        writer (`Writer`): the model.
        memory (`Tensor`): `[B, m, d]`.
        length (`int`): how many tokens, n.
        callback (`Callable`, *optional*): called with the tokens `[B]` of each position as soon as they are decoded.

    Returns:
        `Tensor`: `[B, n]` token ids.
    """
    tokens = []
    for token, _ in _decode(writer, memory, length):
        tokens.append(token)
        if callback is not None:
            callback(token)
    return torch.stack(tokens, dim=1) if tokens else torch.zeros(len(memory), 0, dtype=torch.long, device=memory.device)


@torch.no_grad()
def recite(writer: Writer, memory: Tensor, length: int) -> Context:
    """Decode greedily from memory alone, up to an end token or to a token with a probability below CONFIDENT.

    Args:
        writer (`Writer`): the model.
        memory (`Tensor`): `[B, m, d]`.
        length (`int`): the most tokens, n.

    Returns:
        `Context`: B rows of at most n tokens; a memory that cannot recite has a row of length 0.
    """
    end = getattr(writer.backbone.generation_config, "eos_token_id", None)
    ends = torch.tensor([] if end is None else end, dtype=torch.long, device=memory.device).flatten()
    sure = torch.ones(len(memory), dtype=torch.bool, device=memory.device)
    lengths, tokens = sure.long() * 0, []
    for token, probability in _decode(writer, memory, length):
        sure = sure & (probability >= CONFIDENT) & ~torch.isin(token, ends)
        if not sure.any():
            break
        tokens.append(token)
        lengths += sure
    return Context(torch.stack(tokens, dim=1) if tokens else lengths.new_zeros(len(memory), 0), lengths)


def _decode(writer: Writer, memory: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the most likely tokens `[B]` and their probabilities, position by position."""
    embedding = writer.backbone.get_input_embeddings()
    head = output_head(writer.backbone, writer.slots.write_head(writer.adapter))
    names_positions = "position_ids" in inspect.signature(trunk(writer.backbone).forward).parameters
    cache = None
    given = writer.slots.prefix(memory, "write", writer.adapter).to(cast(Tensor, embedding.weight).dtype)
    for place in range(length):
        # A backbone without a cache of keys and values (such as Mamba) reads everything again.
        known: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        # A copy: some backbones add positions to their input in place (GIT), and this may be the state itself.
        new = (given if cache is None else given[:, -1:]).clone()
        if names_positions:  # some count from 0 whatever the cache holds (RoBERTa, Bamba)
            positions = torch.arange(given.shape[1] - new.shape[1], given.shape[1], device=given.device)
            known["position_ids"] = (positions + first_position(writer.backbone)).expand(len(given), -1)
        with write_phase():  # not across the yield, where the caller runs
            output = trunk(fresh(writer.backbone))(
                inputs_embeds=new, use_cache=cache is not None or place == 0, return_dict=True, **known
            )
            logits = head(output.last_hidden_state[:, -1:])[:, -1]
        cache = output.get("past_key_values")
        probability, token = logits.float().softmax(-1).max(-1)
        given = torch.cat([given, embedding(token[:, None])], dim=1)
        yield token, probability


@torch.no_grad()
def fidelity(writer: Writer, memory: Tensor, context: Context) -> Fidelity:
    """How much of each context can be decoded from its memory.

    Args:
        writer (`Writer`): the model.
        memory (`Tensor`): `[B, m, d]`.
        context (`Context`): what was written, B contexts.

    Returns:
        `Fidelity`: `[B]` shares of context tokens.
    """
    decoded = reconstruct(writer, memory, context.input_ids.shape[1])
    same = ((decoded == context.input_ids) & context.mask).sum(1) / context.lengths
    _, recovered = writer.losses(memory, context, recovered=True)
    assert recovered is not None  # for the type checker
    return Fidelity(greedy=same, teacher_forced=recovered)
