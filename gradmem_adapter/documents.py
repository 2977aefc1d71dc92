"""Long texts in memory, written segment by segment."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradmem_adapter.outputs import Fidelity
from gradmem_adapter.segments import Segment
from gradmem_adapter.sequential import text_behind, write_sequential
from gradmem_adapter.state import MemoryState
from gradmem_adapter.texts import TextEncoder
from gradmem_adapter.utils.kinds import check_kind
from gradmem_adapter.utils.wording import counted
from gradmem_adapter.write.batching import batches, progress_bar
from gradmem_adapter.write.budget import Budget
from gradmem_adapter.write.options import WriteOptions

if TYPE_CHECKING:
    from gradmem_adapter.pipeline import GradMemPipeline

Mode: TypeAlias = Literal["parallel", "sequential"]


@dataclass(frozen=True)
class DocumentMemory:
    """A long text in memory.

    Args:
        segments (`tuple[Segment, ...]`): the segments it was written in, in order.
        states (`MemoryState`): with `"parallel"`, one state per segment; with `"sequential"`, one state for all.
        mode (`str`): how it was written.
    """

    segments: tuple[Segment, ...] = field(repr=False)  # the whole text
    states: MemoryState
    mode: Mode

    def __len__(self) -> int:
        """The number of segments."""
        return len(self.segments)

    def side_by_side(self, indices: Sequence[int] | None = None) -> MemoryState:
        """One state from which to read several segments, each of which keeps its own vectors.

        Args:
            indices (`Sequence[int]`, *optional*): the segments, in the desired order; None: all.

        Raises:
            ValueError: `indices` is given, but the document is `"sequential"` and has one state for all segments.
        """
        if indices is not None and self.mode == "sequential":
            raise ValueError("A document written with mode='sequential' has one state for all segments: read .states.")
        return MemoryState.concat(list(self.states if indices is None else self.states[indices]))

    def fidelity(self, pipeline: GradMemPipeline, max_tokens: int | None = None) -> Fidelity:
        """How much of each segment its state gives back.

        With `"sequential"`, `greedy` is the share of tokens that the state recites anywhere, in runs of at least four;
        `teacher_forced` is computed as if the segment came first.

        Args:
            pipeline (`GradMemPipeline`): the pipeline that wrote it.
            max_tokens (`int`, *optional*): the most tokens in a batch, padding included; None: what the device has
                memory for.

        Returns:
            `Fidelity`: shares `[segments]`.
        """
        check_kind("pipeline", pipeline, TextEncoder, "the GradMemPipeline that wrote it")
        model = pipeline.model
        backbone = cast(PreTrainedModel, model.get_base_model())
        budget = Budget.of(backbone).tokens() if max_tokens is None else max_tokens
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for rows in batches([segment.tokens for segment in self.segments], budget):
            ids, mask = pipeline.encode_contexts([self.segments[i].text for i in rows])
            states = self.states[rows if self.mode == "parallel" else [0] * len(rows)]
            found |= zip(rows, zip(*model.fidelity(states, ids, mask), strict=True), strict=True)
        greedy, forced = (torch.stack(shares) for shares in zip(*(found[i] for i in range(len(self))), strict=True))
        if self.mode == "sequential":
            counts = (model.active_peft_config.trained_length, pipeline.max_context_tokens)
            most = min(count for count in (int(self.states.context_tokens), *counts) if count is not None)
            recital = model.reconstruct(self.states, most)[0].tolist()
            first, *_ = self.segments
            texts = [first.text, *(text_behind(*pair) for pair in itertools.pairwise(self.segments))]
            tokens = pipeline.tokenizer(texts, add_special_tokens=False)["input_ids"]
            greedy = torch.tensor([_share_recited(ids, recital) for ids in tokens], device=greedy.device)
        return Fidelity(greedy, forced)


def _share_recited(tokens: list[int], recital: list[int]) -> float:
    """The share of tokens that a recital has in the same order, ignoring short runs, which any text has."""
    runs = SequenceMatcher(None, recital, tokens, autojunk=False).get_matching_blocks()
    return sum(run.size for run in runs if run.size >= min(4, len(tokens))) / len(tokens)


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
    """WRITE a text of any length in segments; `GradMemPipeline.write_document` explains the arguments."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}.")
    if mode == "sequential":
        if max_tokens is not None:
            raise ValueError(
                "max_tokens limits a batch of segments, but mode='sequential' writes them one by one. Leave it out; "
                "segment_tokens limits the length of a segment."
            )
        return _in_one_state(encoder, text, segment_tokens, overlap, options, progress)
    found = tuple(encoder.segments(text, segment_tokens, overlap))
    if not found:
        raise ValueError("There is no text to write: the document is empty.")
    ids = [encoder.tokenizer(segment.text)["input_ids"] for segment in found]
    states = encoder.model.write_many(ids, max_tokens=max_tokens, progress=progress, options=options)
    return DocumentMemory(found, states, mode)


def _in_one_state(
    encoder: TextEncoder,
    text: str | Iterable[str] | Iterable[int],
    segment_tokens: int | None,
    overlap: int | None,
    options: WriteOptions,
    progress: bool | None,
) -> DocumentMemory:
    found: list[Segment] = []
    with progress_bar(None, progress) as advance:

        def read() -> Iterator[Segment]:
            for segment in sequential_segments(encoder, text, segment_tokens, overlap):
                found.append(segment)
                yield segment
                advance(1)

        state = write_sequential(encoder, read(), options)
    return DocumentMemory(tuple(found), state, "sequential")


def sequential_segments(
    encoder: TextEncoder,
    text: str | Iterable[str] | Iterable[int],
    segment_tokens: int | None = None,
    overlap: int | None = None,
    *,
    vectors: int | None = None,
) -> Iterator[Segment]:
    """Cut a text into segments that leave room for what a state already holds.

    Args:
        encoder (`TextEncoder`): the model that writes them, with its tokenizer.
        text, segment_tokens, overlap: as for `encoder.segments`, but None: half the trained length, or as many tokens
            as the model has positions for, and no overlap.
        vectors (`int`, *optional*): the number of the state's vectors; None: the adapter's.

    Raises:
        ValueError: a segment could exceed the room or the positions that the state leaves. Without this check, that
            would fail only after other segments were written.
    """
    config = encoder.model.active_peft_config
    vectors = config.num_memory_tokens if vectors is None else vectors
    trained, most = config.trained_length, encoder.model.longest_update(vectors)
    if most is not None:  # later segments have no special tokens, but white space before them may add a token
        most += len(encoder.tokenizer("")["input_ids"]) - 1
    if segment_tokens is None and trained is not None:
        segment_tokens = max(1, trained // 2 if most is None else min(trained // 2, most))
    if most is not None and segment_tokens is not None and segment_tokens > most:
        raise ValueError(
            f"Segments of {counted(segment_tokens, 'token')} are too long to be written one after the other into a "
            f"state of {counted(vectors, 'vector')}: the model has {encoder.model.positions} positions, and old and "
            f"new memory leave {max(0, most)} of them. Choose segment_tokens of at most that."
        )
    if segment_tokens is not None and trained is not None and segment_tokens >= trained:
        raise ValueError(
            f"Segments of {counted(segment_tokens, 'token')} leave no room for the earlier segments in a state, which "
            f"holds {counted(trained, 'token')} in total, the adapter's trained length. Use shorter segments; the "
            "default is half of that."
        )
    return encoder.segments(text, segment_tokens, 0 if overlap is None else overlap)
