"""READ: the memory as a prefix before a query, with its mask and positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gradmem_adapter.utils.capture import capturing
from gradmem_adapter.utils.kinds import as_indices
from gradmem_adapter.utils.tokens import as_long
from gradmem_adapter.utils.wording import counted


def check_queries(queries: int) -> None:
    """Raise `ValueError` for an empty batch of queries, which the layers of backbones cannot process."""
    if not capturing() and not queries:
        raise ValueError("There is no query to read: the batch of prompts is empty. Pass at least one prompt.")


def memory_of_queries(vectors: Tensor, queries: int, context_index: Tensor | None) -> Tensor:
    """The memory that each query reads.

    Args:
        vectors (`Tensor`): `[S, m, d]`, the memory of S states.
        queries (`int`): B, how many queries there are.
        context_index (`Tensor`, *optional*): integers `[B]`, the state of each query, or `[B, k]`, the k states that it
            reads side by side. Defaults to one state for all queries, or to one state per query in the same order.

    Returns:
        `Tensor`: `[B, m, d]`, or `[B, k m, d]` for states side by side.

    Raises:
        ValueError: there is no query, an index is out of range, or the numbers of states and queries do not match.
    """
    check_queries(queries)
    if context_index is not None:
        index = as_long(as_indices("context_index", context_index, "a tensor of integers", vectors.device))
        if index.shape[:1] != (queries,) or index.dim() > 2 or 0 in index.shape or index.dtype != torch.long:
            raise ValueError(
                f"context_index must have one integer, or one row of integers, for each query ({queries}), got shape "
                f"{tuple(index.shape)} of {index.dtype}."
            )
        if not capturing() and (index.min() < 0 or index.max() >= len(vectors)):
            raise ValueError(f"context_index must be between 0 and {len(vectors) - 1}, got {index.tolist()}.")
        return vectors[index] if index.dim() == 1 else vectors[index].flatten(1, 2)
    if len(vectors) == queries:
        return vectors
    if len(vectors) == 1:
        return vectors.expand(queries, -1, -1)
    raise ValueError(
        f"Got {counted(queries, 'query')} for {counted(len(vectors), 'memory state')}: pass one state for all, one for "
        "each query, or context_index with the state of each. To ask one question about several states, use "
        "GradMemPipeline.surest_answer, which answers from the state that most likely holds the answer, or "
        "MemoryState.concat, which reads all states side by side."
    )


class Layout(NamedTuple):
    """The order of prefix and query tokens: `[padding; prefix; query]`, with the prefix right before the first query
    token.

    Padding in between would push the memory out of sliding attention windows and, in models without position ids,
    away from the query.

    Args:
        prefix_length (`int`): P, the length of the prefix.
        length (`int`): T, the query's length.
        source (`Tensor`, *optional*): `[B, P+T]`, for each position, the index into `[prefix; query]` of its token.
            `None`: no query is padded on the left. Either way, a query token that is not padding moves right by P
            positions.
    """

    prefix_length: int
    length: int
    source: Tensor | None = None

    @classmethod
    def of(cls, attention_mask: Tensor, prefix_length: int) -> Layout:
        """The layout of queries with a mask.

        Args:
            attention_mask (`Tensor`): `[B, T]`, 1 where a query token counts.
            prefix_length (`int`): P, the length of the prefix.
        """
        length = attention_mask.shape[1]
        left = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
        if not capturing() and not (left > 0).any():
            return cls(prefix_length, length)
        places = torch.arange(prefix_length + length, device=attention_mask.device).expand(len(attention_mask), -1)
        source = torch.where(
            places < left, places + prefix_length, torch.where(places < left + prefix_length, places - left, places)
        )
        return cls(prefix_length, length, source)

    def join(self, prefix: Tensor, query: Tensor) -> Tensor:
        """`[B, P, ...]` and `[B, T, ...]` to `[B, P+T, ...]`, in the query's dtype and on its device."""
        joined = torch.cat([prefix.to(query), query], dim=1)
        if self.source is None:
            return joined
        return joined.gather(1, self.source.view(*self.source.shape, *[1] * (joined.dim() - 2)).expand_as(joined))

    def split(self, joined: Tensor, new: int = 0, dims: Sequence[int] = (-2,)) -> Tensor:
        """The backbone's output for each position, without the prefix.

        At padded positions the output belongs to no token, as without a prefix.

        Args:
            joined (`Tensor`): `[..., P+T, n]`; with any other length it is returned whole, because the prefix is then
                in a cache.
            new (`int`, *optional*, defaults to 0): how many new tokens follow the query, when decoding without a cache.
            dims (`Sequence[int]`, *optional*): the candidates for the position dimension; the first one with the right
                length is used.
        """
        length = self.length + new
        dim = next((dim for dim in dims if joined.shape[dim] == self.prefix_length + length), None)
        return joined if dim is None else joined.narrow(dim, self.prefix_length, length)

    def split_outputs(self, output: Mapping[str, Any], new: int = 0) -> dict[str, Any]:
        """The query's part of the layers' outputs: hidden states, attention weights and router logits.

        Args:
            output (`Mapping`): the backbone's output, with a tuple for each; layers without one of them have `None`.
            new (`int`, *optional*, defaults to 0): as for `split`.
        """
        length = self.prefix_length + self.length + new
        # Most hidden states are [B, P+T, h]; with several streams [streams, B, P+T, h] or [B, P+T, streams, h].
        split: dict[str, Callable[[Tensor], Tensor]] = {
            "hidden_states": lambda part: self.split(part, new, (-2, 1)),
            "attentions": lambda part: self.split(part, new),
            "router_logits": lambda part: self.split(part.unflatten(0, (-1, length)), new).flatten(0, 1),
        }
        return {
            name: tuple(part if part is None else of(part) for part in output[name])
            for name, of in split.items()
            if output.get(name) is not None
        }

    def places(self, logits_to_keep: int | Tensor) -> Tensor:
        """Convert `logits_to_keep` of the query to the one of `[prefix; query]`.

        Args:
            logits_to_keep (`int` or `Tensor`): a number of last positions of the query, indices, or a mask `[B, T]`.
        """
        if isinstance(logits_to_keep, Tensor) and logits_to_keep.dtype == torch.bool and logits_to_keep.dim() == 2:
            return F.pad(logits_to_keep, (self.prefix_length, 0))
        places = torch.arange(self.prefix_length, self.prefix_length + self.length)
        if isinstance(logits_to_keep, Tensor):
            return places.to(logits_to_keep.device)[logits_to_keep]
        return places[slice(-logits_to_keep, None)]


class ReadInputs(NamedTuple):
    """The backbone's inputs for `[prefix; query]`.

    Args:
        layout (`Layout`): the order of prefix and query.
        inputs_embeds (`Tensor`): `[B, P+T, d]`.
        attention_mask (`Tensor`, *optional*): `[B, P+T]`. `None`: every position counts.
        first_position (`int`, *optional*, defaults to 0): the position id of the first token that is not padding.
    """

    layout: Layout
    inputs_embeds: Tensor
    attention_mask: Tensor | None
    first_position: int = 0

    @property
    def position_ids(self) -> Tensor | None:
        """`[B, P+T]`, counted from the first token that is not padding. `None`: the backbone counts by itself."""
        if self.attention_mask is None:
            return None
        return (self.attention_mask.long().cumsum(1) - 1).clamp(min=0) + self.first_position


def read_inputs(
    prefix: Tensor, query_embeddings: Tensor, attention_mask: Tensor | None, first_position: int = 0
) -> ReadInputs:
    """Put a prefix before queries.

    Args:
        prefix (`Tensor`): `[B, P, d]`.
        query_embeddings (`Tensor`): `[B, T, d]`.
        attention_mask (`Tensor`, *optional*): `[B, T]`, 1 where a query token counts, padding on either side. Defaults
            to no padding.
        first_position (`int`, *optional*, defaults to 0): the backbone's first position id.
    """
    if attention_mask is None:
        layout = Layout(prefix.shape[1], query_embeddings.shape[1])
        return ReadInputs(layout, layout.join(prefix, query_embeddings), None, first_position)
    # A pad token's embedding may be zeros, where norms have no derivative (Gemma 3n), so a prefix vector replaces it.
    counts = attention_mask[..., None].bool()
    query_embeddings = torch.where(counts, query_embeddings, prefix[:, :1].detach().to(query_embeddings))
    layout = Layout.of(attention_mask, prefix.shape[1])
    ones = attention_mask.new_ones(prefix.shape[:2])
    mask = layout.join(ones, attention_mask)
    return ReadInputs(layout, layout.join(prefix, query_embeddings), mask, first_position)
