"""How much a preceding passage helps to predict the text that follows: in memory, as text, and not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pydantic
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from evaluation.data import Passage, Rows, cut_passages
from gradmem_adapter.lora import without_lora
from gradmem_adapter.read.likelihood import log_likelihood
from gradmem_adapter.utils.files import read_text
from gradmem_adapter.utils.wording import counted

from .base import OPTIONS, Measurement, Task

if TYPE_CHECKING:
    from evaluation.run import Answerer

BATCH = 8
"""Passages per batch."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Continuation(Task):
    """Passages spread over a text are written, and the tokens after each are predicted.

    With memory, the adapter predicts; without memory, and with the passage as text, the backbone alone does.

    Args:
        text (`str`): a file, gzipped or not.
        tokens (`int`, *optional*, defaults to `256`): the length of a passage.
        next_tokens (`int`, *optional*, defaults to `128`): how many tokens are predicted. The first does not count, as
            without memory there is nothing to predict it from.
        passages (`int`, *optional*, defaults to `64`): the number of passages, spread evenly over the text.
    """

    text: str
    tokens: pydantic.PositiveInt = 256
    next_tokens: pydantic.PositiveInt = pydantic.Field(default=128, ge=2)
    passages: pydantic.PositiveInt = 64

    name = "continuation"

    @property
    def dataset(self) -> str:
        """The name of the text's file."""
        return Path(self.text).name

    @property
    def settings(self) -> dict[str, Any]:
        """The lengths."""
        return {"tokens": self.tokens, "next_tokens": self.next_tokens, "passages": self.passages}

    def rows(self, split: str) -> Rows:
        """Raises `ValueError`: nothing is asked."""
        raise ValueError("The task continuation can only be measured. For training, use plain_text.")

    def measure(
        self, answerer: Answerer, split: str, *, states: int = 1, limit: int | None = None, seed: int = 0
    ) -> Measurement:
        """The losses next_memory, next_nothing and next_text in nats per token, and how much of the gap memory closes:

            gap_closed = (next_nothing - next_memory) / mean(next_nothing - next_text)

        Raises:
            TypeError: the model has no memory states.
        """
        model = answerer.model
        if not isinstance(model, PeftModel):
            raise TypeError("The task continuation measures memory states, so it needs the method gradmem.")
        found = cut_passages(read_text(Path(self.text)), answerer.tokenizer, self.tokens + self.next_tokens)
        if len(found) < self.passages:
            raise ValueError(f"{self.text} has {counted(len(found), 'passage')} of that length, not {self.passages}.")
        found = [found[i * len(found) // self.passages] for i in range(self.passages)][:limit]
        texts, following = ([row[part] for row in found] for part in (slice(self.tokens), slice(self.tokens, None)))
        memory = model.prefix_embeddings(answerer.config.method.read(model, answerer.tokenizer, texts, answerer.steps))
        alone = without_lora(cast(PreTrainedModel, model.get_base_model()))
        values = {
            "next_memory": losses(model.get_base_model(), memory, [[]] * len(texts), following),
            "next_nothing": losses(alone, memory[:, :0], [[]] * len(texts), following),
            "next_text": losses(alone, memory[:, :0], texts, following),
        }
        gap = (values["next_nothing"] - values["next_text"]).mean()
        values["gap_closed"] = (values["next_nothing"] - values["next_memory"]) / gap
        return Measurement(values, {"context_tokens": self.tokens}, {"checkpoint": answerer.checkpoint})


def losses(backbone: Any, prefix: Tensor, before: Sequence[Passage], texts: Sequence[Passage]) -> Tensor:
    """The mean loss `[n]`, in nats, of the tokens of each text except the first, after `[prefix; before]`."""
    parts = []
    for i in range(0, len(texts), BATCH):
        rows = range(i, min(i + BATCH, len(texts)))
        queries = [[*before[j], texts[j][0]] for j in rows]
        parts.append(-log_likelihood(backbone, prefix[i : i + BATCH], queries, [texts[j][1:] for j in rows]))
    return torch.cat(parts)
