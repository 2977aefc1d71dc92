"""As many tokens of the context as the memory has vectors. With none, it shows what the questions alone reveal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic
from torch import Tensor
from transformers import PreTrainedModel

from .base import OPTIONS, cache_bytes
from .prefix import Prefix, PrefixMethod, PrefixModel


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class TruncatedText(PrefixMethod):
    """A causal LM on `[first m tokens of the context; query]`.

    Args:
        tokens (`int`, *optional*): m, the number of tokens; None: `num_memory_tokens` of the run. 0: no context.
    """

    tokens: pydantic.NonNegativeInt | None = None

    name = "truncated_text"
    title = "text cut to m tokens"
    color, marker = "#cc79a7", "v"

    @classmethod
    def title_at(cls, memory_tokens: int) -> str:
        """Without any tokens, "no context"."""
        return cls.title if memory_tokens else "no context"

    def memory_tokens(self, memory: Mapping[str, Any]) -> int:
        """m."""
        return super().memory_tokens(memory) if self.tokens is None else self.tokens

    def bytes_per_context(self, backbone: PreTrainedModel, memory: Mapping[str, Any], tokens: float) -> float:
        """Keys and values of m tokens."""
        return cache_bytes(backbone, self.memory_tokens(memory))

    def prefix(self, model: PrefixModel, context: Tensor, lengths: Tensor, steps: int) -> Prefix:
        """The embeddings of the first m tokens."""
        kept = context[:, : model.num_memory_tokens]
        return Prefix(model.embed(kept), lengths.clamp(max=kept.shape[1]))
