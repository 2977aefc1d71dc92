"""A long text in one memory state: each segment is written into the state of the previous one."""

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
    """WRITE segments one after the other into one state, with the device memory that a single segment needs.

    Args:
        encoder (`TextEncoder`): a model with its tokenizer.
        segments (`Iterable[Segment]`): the segments in order; they are read lazily.
        options (`WriteOptions`): how to write each segment.
        memory (`MemoryState`, *optional*): a state to add the segments to. None: a new one.
        strict (`bool`, *optional*, defaults to `True`): refuse a `memory` that another model wrote.

    Raises:
        ValueError: there are no segments, `memory` holds several states, or `objective="self_study"`, which writes each
            text by itself.
    """
    if options.objective == "self_study":
        raise ValueError(
            "objective='self_study' writes each text into a state of its own and cannot continue from a state. Write "
            "the segments with mode='parallel', or the new text separately, and join the states with "
            "MemoryState.concat."
        )
    known = 0
    if isinstance(memory, MemoryState):  # `update` refuses anything else
        if len(memory) != 1:
            raise ValueError(
                f"A text can be added to one state, got {counted(len(memory), 'state')}. Update them one by one: "
                "memory[i]."
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
            f"One state now stands for {tokens:,} tokens, but the adapter was trained on at most {trained:,} per "
            "state: most of the rest is lost, including new text. Use write_document(mode='parallel'), which writes a "
            "state for each segment.",
            stacklevel=3,
        )
    return memory


def text_behind(before: Segment | None, segment: Segment) -> str:
    """The text to write for a segment after others: with a space before it, unless the text has no white space there.

    Args:
        before (`Segment`, *optional*): the previous segment of the same text.
        segment (`Segment`): the segment; its tokens get no special ones, as they are in the middle of a text.
    """
    return segment.text if before is not None and before.end == segment.start else f" {segment.text}"
