"""Natural text: how much of a passage comes back from memory, and what memory is worth for the text that follows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gradmem_adapter.pipeline import pad
from gradmem_adapter.state import MemoryState

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
    greedy_tokens: Estimate
    """The same as a number of tokens in a passage."""
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


def reconstruction(
    model: PeftModel, texts: Sequence[Passage], *, state: MemoryState | None = None, **write_options: Any
) -> Reconstruction:
    """WRITE passages and decode them.

    Args:
        state: of the passages, where they have been written.
        write_options: what `model.write_many` takes: steps, lr, max_tokens, ...
    """
    if state is None:
        state = model.write_many(texts, progress=False, **write_options)
    greedy, forced = [], []
    for rows in _batches(len(texts)):
        found = model.fidelity(state[rows], *pad([texts[i] for i in rows], "right", 0))
        greedy.append(found.greedy)
        forced.append(found.teacher_forced)
    shares = torch.cat(greedy)
    lengths = torch.tensor([len(text) for text in texts], device=shares.device)
    return Reconstruction(
        Estimate.of(shares),
        Estimate.of((shares * lengths).round()),
        Estimate.of(torch.cat(forced)),
        Estimate.of((shares == 1).double()),
        Estimate.of(state.write_losses[:, -1]),
    )


@torch.no_grad()
def next_chunk(
    model: PeftModel,
    texts: Sequence[tuple[Passage, Passage]],
    *,
    state: MemoryState | None = None,
    **write_options: Any,
) -> NextChunk:
    """How well the second passage of each pair is predicted with the first in memory, without it, and as text.

    All tokens of the second passage but its first count, for which there is nothing to predict it from without memory.

    Args:
        state: of the first passages, where they have been written.
        write_options: what `model.write_many` takes.

    Raises:
        ValueError: a second passage has fewer than two tokens, so none that counts; the message names the pair.
    """
    for i, (_, second) in enumerate(texts):
        if len(second) < 2:
            raise ValueError(f"The second passage of pair {i} has {len(second)} tokens; at least 2 are needed.")
    if state is None:
        state = model.write_many([first for first, _ in texts], progress=False, **write_options)
    losses: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows in _batches(len(texts)):
        firsts, seconds = zip(*(texts[i] for i in rows), strict=True)
        whole = [[*first, *second] for first, second in zip(firsts, seconds, strict=True)]
        losses.append(
            (
                _nats(model, seconds, [0] * len(rows), state[rows]),
                _nats(model, seconds, [0] * len(rows)),
                _nats(model, whole, [len(first) for first in firsts]),
            )
        )
    return NextChunk(*(Estimate.of(torch.cat(values)) for values in zip(*losses, strict=True)))


def _batches(count: int, size: int = 16) -> Iterator[list[int]]:
    for start in range(0, count, size):
        yield list(range(start, min(start + size, count)))


def _nats(model: PeftModel, rows: Sequence[Passage], begin: Sequence[int], memory: MemoryState | None = None) -> Tensor:
    """[B] mean loss of the tokens of each row after the one at `begin`."""
    ids, mask = (tensor.to(model.device) for tensor in pad(rows, "right", 0))
    logits = model(input_ids=ids, attention_mask=mask, memory=memory).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
    place = torch.arange(1, ids.shape[1], device=ids.device)
    counts = mask[:, 1:].bool() & (place > torch.tensor(begin, device=ids.device)[:, None])
    return losses.masked_fill(~counts, 0).sum(1) / counts.sum(1)
