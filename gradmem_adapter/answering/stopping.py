"""What ends an answer: stop strings, however tokens fall on them, in whole answers and in streams, and its caller."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from gradmem_adapter.pipeline import GradMemPipeline


class Answer(NamedTuple):
    """What new tokens say.

    Args:
        tokens (`list[int]`): with the one that ends the text, without padding behind it.
        text (`str`): up to a stop.
        stopped (`bool`): whether it ended by itself; else there was no room for more.
    """

    tokens: list[int]
    text: str
    stopped: bool

    @classmethod
    def of(cls, pipeline: GradMemPipeline, tokens: list[int], stops: Sequence[str]) -> Answer:
        """What a call's new tokens say.

        Args:
            pipeline (`GradMemPipeline`): who answered.
            tokens (`list[int]`): all that it gave.
            stops (`Sequence[str]`): texts that end an answer.
        """
        eos = pipeline.model.generation_config.eos_token_id
        ends = set(eos if isinstance(eos, list) else [eos])
        length = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
        text, stopped = cut_at_stop(str(pipeline.tokenizer.decode(tokens[:length], skip_special_tokens=True)), stops)
        return cls(tokens[:length], text, stopped or length is not None)


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the stop that is complete first, as a stream finds it, and whether there was one."""
    places = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)[1]], True) if places else (text, False)


def settled(text: str, stops: Sequence[str]) -> str:
    """The part of a growing text that stays: without what may be the beginning of a stop, or of a character."""
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held].rstrip("\N{REPLACEMENT CHARACTER}")


def pieces_until_stop(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Pieces up to a stop, and whether it came. What could be the beginning of a stop is held back until it is not."""
    text, sent = "", 0
    for piece in pieces:
        text += piece
        whole, stopped = cut_at_stop(text, stops)
        if stopped:
            yield whole[sent:], True
            return
        safe = max(sent, len(settled(text, stops)))
        yield text[sent:safe], False
        sent = safe
    yield text[sent:], False


class NewTokens(StoppingCriteria):
    """Keeps each row's new tokens, and ends a row that has a stop in its text or was cancelled.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): what decodes the tokens.
        prompt_length (`int`): tokens of the padded prompts, after which the new ones begin.
        stops (`Sequence[str]`): texts that end a row.
        cancelled (`Sequence[threading.Event]`): of each row; once set, it ends with its next token.
        progress (`Sequence[Callable]`, *optional*): of each row; given its new tokens when there is one more.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        stops: Sequence[str],
        cancelled: Sequence[threading.Event],
        progress: Sequence[Callable[[list[int]], None]] = (),
    ) -> None:
        self.tokenizer, self.prompt_length, self.stops, self.cancelled = tokenizer, prompt_length, stops, cancelled
        self.progress = progress
        self.rows: dict[int, list[int]] = {}
        """The new tokens of each row, padding after its end left out."""
        self.stopped: set[int] = set()

    def text(self, tokens: list[int]) -> str:
        """The text of new tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        for i, row in enumerate(input_ids[:, self.prompt_length :].tolist()):
            if i in self.stopped:
                continue  # what comes now is padding, while other rows go on
            self.rows[i] = row
            if self.progress:
                self.progress[i](row)
            if self.cancelled[i].is_set() or (self.stops and cut_at_stop(self.text(row), self.stops)[1]):
                self.stopped.add(i)
        return torch.tensor([i in self.stopped for i in range(len(input_ids))], device=input_ids.device)
