"""Natural text: how much of a passage comes back from memory, and how memory helps to predict what follows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
import torch
from peft import PeftModel
from torch import Tensor

from evaluation.data import Passage, Rows, cut_passages
from gradmem_adapter.ops.padding import pad
from gradmem_adapter.state import MemoryState
from gradmem_adapter.utils.files import read_text
from gradmem_adapter.utils.wording import counted

from .base import OPTIONS, Measurement, Task

if TYPE_CHECKING:
    from evaluation.run import Answerer


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Reconstruction(Task):
    """The first passages of a text are written and decoded greedily from memory alone, and what follows is predicted.

    Args:
        text (`str`): a file, gzipped or not.
        tokens (`int`, *optional*, defaults to `128`): the length of a passage.
        passages (`int`, *optional*, defaults to `64`): the number of consecutive passages.
        optimizer (`str`, *optional*): the write optimizer, "sgd" or "adam"; None: the adapter's own.
        lr (`float`, *optional*): the write learning rate of every step; None: the adapter's own.
    """

    text: str
    tokens: pydantic.PositiveInt = pydantic.Field(default=128, ge=2)
    passages: pydantic.PositiveInt = 64
    optimizer: Literal["sgd", "adam"] | None = None
    lr: pydantic.PositiveFloat | None = None

    name = "reconstruction"

    @property
    def dataset(self) -> str:
        """The name of the text's file."""
        return Path(self.text).name

    @property
    def settings(self) -> dict[str, Any]:
        """The passages, and how they are written."""
        return {"tokens": self.tokens, "passages": self.passages, "optimizer": self.optimizer, "lr": self.lr}

    def rows(self, split: str) -> Rows:
        """Raises `ValueError`: nothing is asked."""
        raise ValueError("The task reconstruction can only be measured. For training, use plain_text.")

    def measure(
        self, answerer: Answerer, split: str, *, states: int = 1, limit: int | None = None, seed: int = 0
    ) -> Measurement:
        """WRITE the passages, decode them, and predict each from the memory of the one before.

        The prediction is left out for a single passage, and if two passages exceed the model's positions.

        Raises:
            TypeError: the model has no memory states.
        """
        model = answerer.model
        if not isinstance(model, PeftModel):
            raise TypeError("The task reconstruction decodes memory states, so it needs the method gradmem.")
        texts = cut_passages(read_text(Path(self.text)), answerer.tokenizer, self.tokens, limit or self.passages)
        state = model.write_many(texts, progress=False, steps=answerer.steps, optimizer=self.optimizer, lr=self.lr)
        values = recited(model, texts, state)
        if len(texts) > 1 and (model.positions is None or 2 * self.tokens <= model.positions):
            values |= predicted(model, list(pairwise(texts)), state[:-1])
        return Measurement(values, {"context_tokens": self.tokens}, {"checkpoint": answerer.checkpoint})


def recited(model: PeftModel, texts: Sequence[Passage], state: MemoryState) -> dict[str, Tensor]:
    """How much greedy decoding from the memory of each passage gets back, [n] each.

    Returns:
        greedy_tokens and greedy, the number and the share of tokens that are right at their positions; teacher_forced,
        the share that are the first choice given the true tokens before them (which flatters); whole, whether there is
        no mistake; write_loss after the last write step, in nats per token.
    """
    parts = [model.fidelity(state[rows], *pad([texts[i] for i in rows], "right", 0)) for rows in _batches(len(texts))]
    greedy = torch.cat([part.greedy for part in parts])
    lengths = torch.tensor([len(text) for text in texts], device=greedy.device)
    return {
        "greedy_tokens": (greedy * lengths).round(),
        "greedy": greedy,
        "teacher_forced": torch.cat([part.teacher_forced for part in parts]),
        "whole": (greedy == 1).double(),
        "write_loss": state.write_losses[:, -1],
    }


@torch.no_grad()
def predicted(model: PeftModel, texts: Sequence[tuple[Passage, Passage]], state: MemoryState) -> dict[str, Tensor]:
    """How well the second passage of each pair is predicted with the first in memory, without it, and as text.

    The first token of the second passage does not count: without memory there is nothing to predict it from.

    Args:
        state: the memory of the first passages.

    Returns:
        next_memory, next_nothing and next_text, in nats per token, [n] each: perplexity is their exponential.

    Raises:
        ValueError: a second passage has fewer than two tokens; the message names the pair.
    """
    for i, (_, second) in enumerate(texts):
        if len(second) < 2:
            raise ValueError(
                f"The second passage of pair {i} must have at least 2 tokens, got {counted(len(second), 'token')}."
            )
    losses: dict[str, list[Tensor]] = {"next_memory": [], "next_nothing": [], "next_text": []}
    for rows in _batches(len(texts)):
        firsts, seconds = zip(*(texts[i] for i in rows), strict=True)
        whole = [[*first, *second] for first, second in zip(firsts, seconds, strict=True)]
        losses["next_memory"].append(_nats(model, seconds, [0] * len(rows), state[rows]))
        losses["next_nothing"].append(_nats(model, seconds, [0] * len(rows)))
        losses["next_text"].append(_nats(model, whole, [len(first) for first in firsts]))
    return {name: torch.cat(parts) for name, parts in losses.items()}


def _batches(count: int, size: int = 16) -> Iterator[list[int]]:
    for start in range(0, count, size):
        yield list(range(start, min(start + size, count)))


def _nats(model: PeftModel, rows: Sequence[Passage], begin: Sequence[int], memory: MemoryState | None = None) -> Tensor:
    """[B] mean losses of the tokens of each row after the one at `begin`."""
    ids, mask = (tensor.to(model.device) for tensor in pad(rows, "right", 0))
    logits = model(input_ids=ids, attention_mask=mask, memory=memory).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
    place = torch.arange(1, ids.shape[1], device=ids.device)
    counts = mask[:, 1:].bool() & (place > torch.tensor(begin, device=ids.device)[:, None])
    return losses.masked_fill(~counts, 0).sum(1) / counts.sum(1)
