"""The whole context before every query: no compression, the upper bound that costs a cache as long as the context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic
from torch import Tensor
from transformers import PreTrainedModel

from .base import OPTIONS, cache_bytes
from .prefix import Prefix, PrefixMethod, PrefixModel


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class FullContext(PrefixMethod):
    """A causal LM on `[context; query]`."""

    name = "full_context"
    title = "full context"
    color, marker = "#333333", "^"
    context_per_query = True

    def memory_tokens(self, memory: Mapping[str, Any]) -> int:
        """There is no memory of fixed size."""
        return 0

    def bytes_per_context(self, backbone: PreTrainedModel, memory: Mapping[str, Any], tokens: float) -> float:
        """Keys and values of all tokens."""
        return cache_bytes(backbone, tokens)

    def prefix(self, model: PrefixModel, context: Tensor, lengths: Tensor, steps: int) -> Prefix:
        """The context's own embeddings; there is nothing to write."""
        return Prefix(model.embed(context), lengths)
