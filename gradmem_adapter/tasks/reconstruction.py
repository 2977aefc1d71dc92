"""Natural text: how much of a passage comes back from memory, and what memory is worth for the text that follows."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Passage = list[int]
"""Token ids."""


class Estimate(NamedTuple):
    """A mean over passages and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Args: values: [n], from 1 on."""
        values = values.double()
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(values.mean().item(), error)


class Reconstruction(NamedTuple):
    """What came back of passages by greedy decoding from memory alone."""

    greedy: Estimate
    """Share of tokens, place by place."""
    teacher_forced: Estimate
    """Share of tokens that are the first choice given the true ones before; flatters."""
    whole: Estimate
    """Share of passages that came back without a mistake."""
    write_loss: Estimate
    """After the last write step, nats a token."""


class NextChunk(NamedTuple):
    """Nats a token of the text that follows a passage: perplexity is their exponential."""

    memory: Estimate
    """Given the memory of the passage."""
    nothing: Estimate
    """Given nothing."""
    text: Estimate
    """Given the passage itself."""


def read_text(path: Path) -> str:
    """A text file, gzipped or not."""
    return gzip.open(path, "rt", encoding="utf-8").read() if path.suffix == ".gz" else path.read_text(encoding="utf-8")


def passages(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int, count: int | None = None) -> list[Passage]:
    """Passages of exactly `tokens` tokens of running prose, one after another; headings (` = Title = `) are left out.

    A passage lies within one paragraph or goes over into the next; what is left at the end is dropped.

    Raises:
        ValueError: the text is too short for `count` passages, or for one.
    """
    lines = (line.strip() for line in text.splitlines())
    prose = "\n".join(line for line in lines if line and not (line.startswith("= ") and line.endswith(" =")))
    ids = list(tokenizer(prose, add_special_tokens=False)["input_ids"])
    found = [ids[i : i + tokens] for i in range(0, len(ids) - tokens + 1, tokens)][:count]
    if len(found) < (1 if count is None else count):
        raise ValueError(
            f"The text has {len(ids)} tokens: {len(ids) // tokens} passages of {tokens}, not {count or 'one'}."
        )
    return found


def reconstruction(model: PeftModel, texts: Sequence[Passage], **write_options: Any) -> Reconstruction:
    """WRITE passages of one length and decode them.

    Args:
        write_options: what `model.write_many` takes: steps, lr, max_tokens, ...
    """
    state = model.write_many(texts, progress=False, **write_options)
    greedy, forced = [], []
    for start in range(0, len(texts), 16):
        rows = list(range(start, min(start + 16, len(texts))))
        found = model.fidelity(state[rows], torch.tensor([texts[i] for i in rows]))
        greedy.append(found.greedy)
        forced.append(found.teacher_forced)
    shares = torch.cat(greedy)
    return Reconstruction(
        Estimate.of(shares),
        Estimate.of(torch.cat(forced)),
        Estimate.of((shares == 1).double()),
        Estimate.of(state.write_losses[:, -1]),
    )


@torch.no_grad()
def next_chunk(model: PeftModel, texts: Sequence[tuple[Passage, Passage]], **write_options: Any) -> NextChunk:
    """How well the second passage of each pair is predicted with the first in memory, without it, and as text.

    All tokens of the second passage but its first count, for which there is nothing to predict it from without memory.

    Args:
        write_options: what `model.write_many` takes.
    """
    state = model.write_many([first for first, _ in texts], progress=False, **write_options)
    losses: list[list[Tensor]] = [[], [], []]
    for i, (first, second) in enumerate(texts):
        before, after = (torch.tensor([ids], device=model.device) for ids in (first, second))
        logits = (
            model(input_ids=after, memory=state[i]).logits[:, :-1],
            model(input_ids=after).logits[:, :-1],
            model(input_ids=torch.cat([before, after], dim=1)).logits[:, len(first) : -1],
        )
        for found, values in zip(losses, logits, strict=True):
            found.append(torch.nn.functional.cross_entropy(values[0].float(), after[0, 1:]))
    return NextChunk(*(Estimate.of(torch.stack(values)) for values in losses))
