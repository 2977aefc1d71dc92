"""The whole context before every query: no compression, the upper bound that costs a cache as long as the context."""

from __future__ import annotations

from torch import Tensor

from .prefix_model import Prefix, PrefixModel


class FullContext(PrefixModel):
    """A causal LM on `[context; query]`."""

    def prefix(self, context: Tensor, lengths: Tensor, steps: int) -> Prefix:
        """The context's own embeddings; there is nothing to write."""
        return Prefix(self.backbone.get_input_embeddings()(context), lengths)
