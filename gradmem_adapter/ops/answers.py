"""The hidden states that predict answers after a prefix and a query, for many answers at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from gradmem_adapter.ops.padding import pad
from gradmem_adapter.utils.backbone import check_length, trunk
from gradmem_adapter.utils.kinds import as_indices
from gradmem_adapter.utils.tokens import check_tokens
from gradmem_adapter.utils.wording import counted


def check_answers(
    backbone: PreTrainedModel, prefix_length: int, queries: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> None:
    """Raise for queries and answers that cannot be read after a prefix.

    Raises:
        TypeError: a token id is not an integer.
        ValueError: the lists are empty or differ in length, an answer is empty, a token id is not in the model's
            vocabulary, or an answer exceeds the model's positions.
    """
    if not len(queries) == len(answers) > 0:
        raise ValueError(
            f"Expected at least one answer, each with its query; got {counted(len(queries), 'query')} and "
            f"{counted(len(answers), 'answer')}."
        )
    if empty := [str(i) for i, answer in enumerate(answers) if not len(answer)]:
        raise ValueError(f"Answer {', '.join(empty)} is empty, so it has no likelihood. Leave it out.")
    rows = [
        as_indices(f"Query {i} with its answer", [*query, *answer], "token ids", torch.device("cpu"))
        for i, (query, answer) in enumerate(zip(queries, answers, strict=True))
    ]
    check_tokens("The list of queries and answers", torch.cat(rows)[None], None, backbone)
    longest = max(rows, key=len)[None, 1:]  # the last token is predicted, not read
    check_length(prefix_length, longest, None, backbone, "A query with its answer up to the last token")


def states_of_answers(
    backbone: Any, prefix: Tensor, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[Tensor]:
    """The last hidden states that predict answers after `[prefix; query]`.

    Args:
        backbone (`PreTrainedModel`): the causal LM.
        prefix (`Tensor`): `[R, P, d]`, or `[1, P, d]` for all rows, which then runs through the model only once.
        rows (`Sequence`): R pairs of a query and an answer, token ids.

    Returns:
        `list[Tensor]`: `[answer, h]` for each row.
    """
    ids, _ = pad([[*query, *answer[:-1]] for query, answer in rows], "right")
    embeddings = backbone.get_input_embeddings()(ids.to(prefix.device))
    prefix = prefix.to(embeddings.dtype)
    # Padding is on the right, where a causal model does not look. With an empty query, an answer of one token reads
    # nothing after the prefix.
    if len(prefix) == 1 and 0 not in (prefix.shape[1], ids.shape[1]) and shares_caches(backbone):
        before = trunk(backbone)(inputs_embeds=prefix, use_cache=True, return_dict=True)
        cache = before.past_key_values
        cache.batch_repeat_interleave(len(rows))
        behind = trunk(backbone)(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, return_dict=True)
        last = before.last_hidden_state[:, -1:].expand(len(rows), -1, -1)
        states, skipped = torch.cat([last, behind.last_hidden_state], dim=1), 0
    else:
        whole = torch.cat([prefix.expand(len(rows), -1, -1), embeddings], dim=1)
        states = trunk(backbone)(inputs_embeds=whole, use_cache=False, return_dict=True).last_hidden_state
        skipped = prefix.shape[1] - 1
    starts = [skipped + len(query) for query, _ in rows]
    return [row[i : i + len(answer)] for row, i, (_, answer) in zip(states, starts, rows, strict=True)]


def shares_caches(backbone: Any) -> bool:
    """Whether the rows of a batch can share the keys and values of a common prefix."""
    if backbone.training or not backbone._supports_default_dynamic_cache():
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=backbone.config).layers)
