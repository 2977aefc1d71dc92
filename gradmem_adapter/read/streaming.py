"""Streaming READ: yields an answer's text while another thread generates it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


def stream_text(
    generate: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, /, *args: Any, **options: Any
) -> Generator[str, None, None]:
    """The new text of one prompt, piece by piece.

    An error in `generate` is raised here; closing the iterator stops the generation.

    Args:
        generate (`Callable`): Transformers' `generate`, or a function with the same options.
        tokenizer (`PreTrainedTokenizerBase`): decodes the tokens.
        args, options: arguments of `generate`.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    cancelled = threading.Event()
    criteria = StoppingCriteriaList([*(options.pop("stopping_criteria", None) or []), _Cancelled(cancelled)])
    errors: list[BaseException] = []

    def run() -> None:
        try:
            generate(*args, streamer=streamer, stopping_criteria=criteria, **options)
        except BaseException as error:
            errors.append(error)
            streamer.on_finalized_text("", stream_end=True)  # not end(), which would decode; decoding may have failed

    thread = threading.Thread(target=run, name="gradmem-stream", daemon=True)
    thread.start()
    try:
        for piece in streamer:
            if piece:
                yield piece
    finally:
        cancelled.set()
        thread.join()
    if errors:
        raise errors[0]


class _Cancelled(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
