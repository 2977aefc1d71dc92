"""The whole context before every query: no compression, the upper bound that costs a cache as long as the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.prompts import Prompt

from .base import OPTIONS, cache_bytes
from .prefix import Prefix, PrefixMethod, PrefixModel


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class FullContext(PrefixMethod):
    """A causal LM on `[context; query]`.

    Args:
        in_prompt (`bool`, *optional*, defaults to `False`): put context and question into one prompt, as one asks an
            untrained model. False: the context stands before the formatted query.
    """

    in_prompt: bool = False

    name = "full_context"
    title = "full context"
    color, marker = "#333333", "^"
    context_per_query = True

    @property
    def settings(self) -> dict[str, Any]:
        """Whether the context is in the prompt."""
        return {"in_prompt": True} if self.in_prompt else {}

    def memory_tokens(self, memory: Mapping[str, Any]) -> int:
        """There is no memory of fixed size."""
        return 0

    def bytes_per_context(self, backbone: PreTrainedModel, memory: Mapping[str, Any], tokens: float) -> float:
        """Keys and values of all tokens."""
        return cache_bytes(backbone, tokens)

    def answer(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        contexts: Sequence[str],
        queries: Sequence[Prompt],
        reads: Sequence[Sequence[int]],
        **options: Any,
    ) -> list[str]:
        """See `Method.answer`."""
        if self.in_prompt:
            texts = ["\n\n".join(contexts[i] for i in row) for row in reads]
            queries = [f"{text}\n\n{query}" for text, query in zip(texts, queries, strict=True)]
            contexts, reads = [""], [[0]] * len(queries)
        return super().answer(model, tokenizer, contexts, queries, reads, **options)

    def prefix(self, model: PrefixModel, context: Tensor, lengths: Tensor, steps: int) -> Prefix:
        """The context's own embeddings; there is nothing to write."""
        return Prefix(model.embed(context), lengths)
