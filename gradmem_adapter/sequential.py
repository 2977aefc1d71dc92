"""A long text in one memory state: each segment is written into the state of the one before."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch

from gradmem_adapter.segments import Segment
from gradmem_adapter.state import MemoryState
from gradmem_adapter.texts import TextEncoder
from gradmem_adapter.utils.wording import counted
from gradmem_adapter.write.options import WriteOptions


def write_sequential(
    encoder: TextEncoder,
    segments: Iterable[Segment],
    options: WriteOptions,
    memory: MemoryState | None = None,
    strict: bool = True,
) -> MemoryState:
    """WRITE segments one after the other into one state, in the memory that a single one takes.

    Args:
        encoder (`TextEncoder`): a model with its tokenizer.
        segments (`Iterable[Segment]`): in order; read as they are written.
        options (`WriteOptions`): how each is written.
        memory (`MemoryState`, *optional*): a state that is to know them besides what it knows. None: a new one.
        strict (`bool`, *optional*, defaults to `True`): refuse a `memory` that another model wrote.

    Raises:
        ValueError: there are no segments, `memory` holds several states, or `objective="self_study"`, which writes each
            text by itself.
    """
    if options.objective == "self_study":
        raise ValueError(
            "objective='self_study' writes each text into a state of its own, and cannot go on from one: write the "
            "segments with mode='parallel', or the new text by itself, and join the states with MemoryState.concat."
        )
    known = 0
    if isinstance(memory, MemoryState):  # anything else is refused by `update`
        if len(memory) != 1:
            raise ValueError(
                f"One state takes one text, got {counted(len(memory), 'state')}: update them one by one, memory[i]."
            )
        known = int(memory.context_tokens)
    before: Segment | None = None
    for segment in segments:
        if memory is None:
            memory = encoder.model.write(*encoder.encode_contexts(segment.text), options=options)
        else:
            ids = torch.tensor([encoder.tokenizer(text_behind(before, segment), add_special_tokens=False)["input_ids"]])
            memory = encoder.model.update(memory, ids, options=options, strict=strict)
        before = segment
    if memory is None or before is None:
        raise ValueError("There is no text to write: the document is empty.")
    tokens, trained = int(memory.context_tokens), encoder.model.active_peft_config.trained_length
    if trained is not None and known <= trained < tokens:
        warnings.warn(
            f"One state now stands for {tokens:,} tokens, and the adapter was trained on up to {trained:,} in one: "
            "most of the rest is lost, new text too. write_document(mode='parallel') writes a state for each segment.",
            stacklevel=3,
        )
    return memory


def text_behind(before: Segment | None, segment: Segment) -> str:
    """What is written of a segment behind others: with white space in between, unless there was none in the text.

    Args:
        before (`Segment`, *optional*): the one before in the same text.
        segment (`Segment`): without special tokens, which are not in the middle of a text.
    """
    return segment.text if before is not None and before.end == segment.start else f" {segment.text}"
