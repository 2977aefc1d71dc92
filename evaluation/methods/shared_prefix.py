"""Greedy answers to many questions on one long context, whose keys and values are computed and stored only once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from gradmem_adapter.utils.backbone import first_position

_TOGETHER = 2048
"""The most tokens of questions asked together: each token has a mask over all of them and over the context."""


def can_share(backbone: PreTrainedModel) -> bool:
    """Whether a backbone supports an arbitrary mask over all earlier tokens.

    Args:
        backbone (`PreTrainedModel`): the causal LM. Backbones with sliding windows or recurrent states do not, nor do
            those without four-dimensional masks, or that count positions themselves.
    """
    parameters = inspect.signature(backbone.forward).parameters
    return (
        {"position_ids", "past_key_values", "logits_to_keep"} <= parameters.keys()
        and backbone.config._attn_implementation in ("eager", "sdpa")
        and not first_position(backbone)
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=backbone.config).layers)
    )


@torch.no_grad()
def answer_on_one(
    backbone: PreTrainedModel, prefix: Tensor, queries: Sequence[Tensor], max_new_tokens: int
) -> list[list[int]]:
    """Greedy new tokens after `[prefix; query]`, for each of several queries on one prefix.

    The queries follow the prefix in one row, and each sees only the prefix and itself. A batch would need a copy of the
    prefix's keys and values for every query.

    Args:
        backbone (`PreTrainedModel`): a causal LM for which `can_share` is true.
        prefix (`Tensor`): embeddings `[P, d]`.
        queries (`Sequence[Tensor]`): embeddings `[T, d]` each, of any lengths.
        max_new_tokens (`int`): the most tokens in an answer, without its end token.
    """
    cache = DynamicCache(config=backbone.config)
    backbone(inputs_embeds=prefix[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    together = max(1, min(len(prefix), _TOGETHER) // max(len(query) for query in queries))
    answers: list[list[int]] = []
    for start in range(0, len(queries), together):
        answers += _greedy(backbone, cache, queries[start : start + together], max_new_tokens)
        cache.crop(len(prefix) - cache.get_seq_length())
    return answers


def _greedy(
    backbone: PreTrainedModel, cache: DynamicCache, queries: Sequence[Tensor], max_new_tokens: int
) -> list[list[int]]:
    """Greedy tokens after the cached prefix. Queries and answers are added to the cache."""
    tokens, length = torch.cat(list(queries)), cache.get_seq_length()
    default, device = backbone.generation_config.eos_token_id, tokens.device
    ends = torch.tensor([] if default is None else default, device=device)
    lengths = torch.tensor([len(query) for query in queries], device=device)
    owner = torch.arange(len(queries), device=device).repeat_interleave(lengths)  # the query of each token
    position = length + torch.cat([torch.arange(len(query), device=device) for query in queries])
    owners, positions, last = owner, position, lengths.cumsum(0) - 1
    answers: list[list[int]] = [[] for _ in queries]
    for _ in range(max_new_tokens):
        seen = (owner[:, None] == owners) & (position[:, None] >= positions)
        mask = torch.where(seen, 0.0, torch.finfo(tokens.dtype).min).to(tokens.dtype)
        new = backbone(
            inputs_embeds=tokens[None], attention_mask=F.pad(mask, (length, 0))[None, None], past_key_values=cache,
            position_ids=position[None], use_cache=True, logits_to_keep=last,
        ).logits[0].argmax(-1)  # fmt: skip
        on = ~torch.isin(new, ends)
        new, owner, position = new[on], owner[last][on], position[last][on] + 1
        for row, token in zip(owner.tolist(), new.tolist(), strict=True):
            answers[row].append(token)
        if not len(new):
            break
        owners, positions = torch.cat([owners, owner]), torch.cat([positions, position])
        tokens, last = backbone.get_input_embeddings()(new), torch.arange(len(new), device=device)
    return answers
