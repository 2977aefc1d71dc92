"""The base class of methods: how a model gets to know a context, which weights are trained, and how it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.ops.padding import pad
from gradmem_adapter.prompts import Prompt, format_query
from gradmem_adapter.write.batching import batches

OPTIONS = pydantic.ConfigDict(extra="forbid")
TOKENS = 16_384
"""The most tokens in a batch of queries, including what stands before them."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Method(ABC):
    """A method; its fields are its options in a run's YAML. Arguments named `memory` hold fields of `GradMemConfig`."""

    name: ClassVar[str]
    """The method's name in YAML and result files."""
    title: ClassVar[str]
    """Its name in tables and legends."""
    color: ClassVar[str]
    """Its colour in every plot, from Okabe and Ito's palette for colour-blind readers."""
    marker: ClassVar[str]
    """Its marker in every plot, by Matplotlib's name."""
    step: ClassVar[str | None] = None
    """What is done K times, such as "step" or "pass"; None: there is no K."""
    context_per_query: ClassVar[bool] = False
    """Whether the whole context stands before every query, so that batches must be smaller."""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that distinguish measurements with the same method."""
        return {}

    @classmethod
    def title_at(cls, memory_tokens: int) -> str:
        """The title with m = `memory_tokens`, for methods that have another title with none."""
        return cls.title

    @abstractmethod
    def build(self, backbone: PreTrainedModel, memory: Mapping[str, Any]) -> nn.Module:
        """The model before training, with the `forward` of `GradMemModel`."""

    @abstractmethod
    def save(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
        """Save what was trained."""

    @abstractmethod
    def load_weights(self, model: nn.Module, path: Path) -> None:
        """Give a model that `build` made the weights that `save` saved."""

    def load(
        self, path: Path, device: torch.device | str, build: Callable[[], tuple[nn.Module, PreTrainedTokenizerBase]]
    ) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """A model that `save` saved and its tokenizer.

        Args:
            build: makes the model before training.
        """
        model, tokenizer = build()
        self.load_weights(model, path)
        return model.to(device).eval(), tokenizer

    def memory_tokens(self, memory: Mapping[str, Any]) -> int:
        """m, the number of memory vectors; 0 if there is no memory of fixed size."""
        return int(memory.get("num_memory_tokens", GradMemConfig().num_memory_tokens))

    def bytes_per_context(self, backbone: PreTrainedModel, memory: Mapping[str, Any], tokens: float) -> float:
        """Bytes kept for a context with this many tokens, in float32."""
        return 4.0 * self.memory_tokens(memory) * backbone.config.get_text_config().hidden_size

    # ---------------------------------------------------------------- answers

    @abstractmethod
    def read(self, model: Any, tokenizer: PreTrainedTokenizerBase, contexts: list[list[int]], steps: int) -> Any:
        """Read contexts (token ids); returns what is kept to answer from."""

    @abstractmethod
    def length(self, model: Any, context: list[int]) -> int:
        """The number of positions that a context takes before a query."""

    @abstractmethod
    def generate(
        self, model: Any, kept: Any, reads: list[list[int]], query: Tensor, mask: Tensor, **options: Any
    ) -> Tensor:
        """New tokens [R, new] after queries [R, T], left padded, each asked of the contexts that `reads` names."""

    def batches(
        self, model: Any, before: Sequence[int], own: Sequence[int], reads: Sequence[Sequence[int]], tokens: int
    ) -> list[list[int]]:
        """Batches of queries that are answered together, as lists of their numbers.

        Args:
            before, own: the number of positions before each query, and of the query itself.
            reads: for each query, the contexts that it is asked of.
            tokens: the most positions in a batch, including padding.
        """
        return batches([sum(pair) for pair in zip(before, own, strict=True)], tokens)

    def answer(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        contexts: Sequence[str],
        queries: Sequence[Prompt],
        reads: Sequence[Sequence[int]],
        *,
        steps: int,
        query_format: str,
        max_new_tokens: int,
        tokens: int = TOKENS,
    ) -> list[str]:
        """Greedy answers.

        Args:
            contexts: texts, each read once.
            reads: for each query, the contexts that it is asked of, side by side, in order.
            steps: K, if the method has one.
            query_format: as in `GradMemConfig`.
        """
        ids = [list(row) for row in tokenizer(list(contexts))["input_ids"]]
        kept, lengths = self.read(model, tokenizer, ids, steps), [self.length(model, row) for row in ids]
        return self.ask(
            model, tokenizer, kept, lengths, queries, reads,
            query_format=query_format, max_new_tokens=max_new_tokens, tokens=tokens,
        )  # fmt: skip

    def ask(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        kept: Any,
        lengths: Sequence[int],
        queries: Sequence[Prompt],
        reads: Sequence[Sequence[int]],
        *,
        query_format: str,
        max_new_tokens: int,
        tokens: int = TOKENS,
    ) -> list[str]:
        """Greedy answers from contexts that were already read.

        Args:
            kept: what `read` returned for the contexts.
            lengths: what `length` returns for each.
            queries, reads, query_format: as for `answer`.
        """
        device = next(model.parameters()).device
        answers: dict[int, str] = {}
        texts = [format_query(query, query_format, tokenizer) for query in queries]
        prompts = [tokenizer(text, add_special_tokens=special)["input_ids"] for text, special in texts]
        before = [sum(lengths[i] for i in row) for row in reads]
        for rows in self.batches(model, before, [max(64, len(ids)) for ids in prompts], reads, tokens):
            own = [prompts[i] for i in rows]
            query, mask = (tensor.to(device) for tensor in pad(own, "left", int(tokenizer.pad_token_id)))
            with torch.no_grad():
                new = self.generate(
                    model, kept, [list(reads[i]) for i in rows], query, mask,
                    max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
            answers |= zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True)
        return [answers[i].strip() for i in range(len(queries))]


def cache_bytes(backbone: PreTrainedModel, tokens: float) -> float:
    """Bytes of the keys and values of this many tokens, in float32."""
    config: Any = backbone.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return float(4 * 2 * config.num_hidden_layers * heads * size * tokens)
