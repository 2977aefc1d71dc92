"""Memory by averaging: the context's last hidden states, pooled."""

from __future__ import annotations

import pydantic
from torch import Tensor

from gradmem_adapter.ops.padding import part_means

from .base import OPTIONS
from .prefix import Prefix, PrefixMethod, PrefixModel


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class MeanPooling(PrefixMethod):
    """Vector j is the mean of the last hidden states over the j-th of m equal parts of the context.

    A context with fewer than m tokens has as many vectors as tokens.
    """

    name = "mean_pooling"
    title = "mean pooling"
    color, marker = "#009e73", "D"

    def prefix(self, model: PrefixModel, context: Tensor, lengths: Tensor, steps: int) -> Prefix:
        """One pass over the context, whatever `steps`."""
        hidden = model.backbone.base_model(context, use_cache=False).last_hidden_state
        return Prefix(*part_means(hidden, lengths, model.num_memory_tokens))
