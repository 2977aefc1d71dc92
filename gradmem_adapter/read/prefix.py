"""READ: the memory as a prefix before a query, with its mask and positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradmem_adapter.utils.capture import capturing


class Layout(NamedTuple):
    """Where prefix and query tokens go: `[padding; prefix; query]`, the prefix right before the first query token.

    Padding in between would push the memory out of sliding attention windows and, in models without position ids,
    away from the query.
    """

    length: int
    """T, the query's."""
    source: Tensor | None = None
    """[B, P+T], for each place the index into `[prefix; query]` that fills it; None: no padding on the left."""
    query: Tensor | None = None
    """[B, T], for each query token its place."""

    @classmethod
    def of(cls, attention_mask: Tensor, prefix_length: int) -> Layout:
        """Args: attention_mask [B, T], 1 where a query token counts."""
        length = attention_mask.shape[1]
        left = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
        if not capturing() and not (left > 0).any():
            return cls(length)
        places = torch.arange(prefix_length + length, device=attention_mask.device).expand(len(attention_mask), -1)
        source = torch.where(
            places < left, places + prefix_length, torch.where(places < left + prefix_length, places - left, places)
        )
        tokens = places[:, :length]
        return cls(length, source, torch.where(tokens < left, tokens, tokens + prefix_length))

    def join(self, prefix: Tensor, query: Tensor) -> Tensor:
        """[B, P, ...] and [B, T, ...] to [B, P+T, ...]."""
        joined = torch.cat([prefix.to(query), query], dim=1)
        if self.source is None:
            return joined
        return joined.gather(1, self.source.view(*self.source.shape, *[1] * (joined.dim() - 2)).expand_as(joined))

    def split(self, joined: Tensor) -> Tensor:
        """The query's part of [B, P+T, V]: [B, T, V]."""
        if self.query is None:
            return joined[:, joined.shape[1] - self.length :]
        return joined.gather(1, self.query[..., None].expand(-1, -1, joined.shape[-1]))


class ReadInputs(NamedTuple):
    """What the backbone gets for `[prefix; query]`."""

    layout: Layout
    inputs_embeds: Tensor
    """[B, P+T, d]."""
    attention_mask: Tensor | None
    """[B, P+T]; None: every place counts."""

    @property
    def position_ids(self) -> Tensor | None:
        """[B, P+T]: counted from 0 at the first place that is not padding. None: as the backbone counts by itself."""
        return None if self.attention_mask is None else (self.attention_mask.long().cumsum(1) - 1).clamp(min=0)


def read_inputs(prefix: Tensor, query_embeddings: Tensor, attention_mask: Tensor | None) -> ReadInputs:
    """Put a prefix [B, P, d] before query embeddings [B, T, d] with their mask [B, T] (None: no padding)."""
    if attention_mask is None:
        layout = Layout(query_embeddings.shape[1])
        return ReadInputs(layout, layout.join(prefix, query_embeddings), None)
    layout = Layout.of(attention_mask, prefix.shape[1])
    ones = attention_mask.new_ones(prefix.shape[:2])
    return ReadInputs(layout, layout.join(prefix, query_embeddings), layout.join(ones, attention_mask))
