"""Long texts in memory: written segment by segment, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.outputs import Fidelity
from gradmem_adapter.segments import Segment
from gradmem_adapter.state import MemoryState
from gradmem_adapter.texts import TextEncoder
from gradmem_adapter.utils.hardware import token_budget
from gradmem_adapter.write.batching import batches
from gradmem_adapter.write.options import WriteOptions

Mode: TypeAlias = Literal["parallel"]


@dataclass(frozen=True)
class DocumentMemory:
    """A long text in memory.

    Args:
        segments (`tuple[Segment, ...]`): the pieces that it was written in, in order.
        states (`MemoryState`): with `"parallel"` one state per segment.
        mode (`str`): how it was written.
    """

    segments: tuple[Segment, ...]
    states: MemoryState
    mode: Mode

    def __len__(self) -> int:
        """How many segments it has."""
        return len(self.segments)

    def side_by_side(self, indices: Sequence[int] | None = None) -> MemoryState:
        """One state to read several segments from, each of which takes its own vectors in it.

        Args:
            indices (`Sequence[int]`, *optional*): which segments, in the order in which they are to stand; None: all.
        """
        return MemoryState.concat(list(self.states if indices is None else self.states[indices]))

    def fidelity(self, encoder: TextEncoder, max_tokens: int | None = None) -> Fidelity:
        """How much of each segment its state gives back.

        Args:
            encoder (`TextEncoder`): the pipeline that wrote it.
            max_tokens (`int`, *optional*): a batch's tokens, padding counted; None: what the device has memory for.

        Returns:
            `Fidelity`: shares `[segments]`.
        """
        model = encoder.model
        backbone = cast(PreTrainedModel, model.get_base_model())
        budget = token_budget(backbone) if max_tokens is None else max_tokens
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for rows in batches([segment.tokens for segment in self.segments], budget):
            ids, mask = encoder.encode_contexts([self.segments[i].text for i in rows])
            found |= zip(rows, zip(*model.fidelity(self.states[rows], ids, mask), strict=True), strict=True)
        greedy, forced = zip(*(found[i] for i in range(len(self))), strict=True)
        return Fidelity(torch.stack(greedy), torch.stack(forced))


def write_document(
    encoder: TextEncoder,
    text: str | Iterable[str] | Iterable[int],
    mode: Mode,
    segment_tokens: int | None,
    overlap: int | None,
    options: WriteOptions,
    max_tokens: int | None,
    progress: bool | None,
) -> DocumentMemory:
    """WRITE a text of any length in segments; `GradMemPipeline.write_document` says what the arguments are."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}.")
    found = tuple(encoder.segments(text, segment_tokens, overlap))
    if not found:
        raise ValueError("There is no text to write: the document is empty.")
    ids = [encoder.tokenizer(segment.text)["input_ids"] for segment in found]
    states = encoder.model.write_many(ids, max_tokens=max_tokens, progress=progress, options=options)
    return DocumentMemory(found, states, mode)
