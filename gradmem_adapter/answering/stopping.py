"""How answers end: by a stop string, whatever tokens it spans, in whole answers and streams; or by being cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from gradmem_adapter.pipeline import GradMemPipeline


class Answer(NamedTuple):
    """A complete answer.

    Args:
        tokens (`list[int]`): the new tokens, including the end token but no padding.
        text (`str`): their text, up to a stop.
        stopped (`bool`): whether the answer ended by itself; otherwise it reached the limit of tokens.
    """

    tokens: list[int]
    text: str
    stopped: bool

    @classmethod
    def of(cls, pipeline: GradMemPipeline, tokens: list[int], stops: Sequence[str]) -> Answer:
        """The answer that a call's new tokens make."""
        eos = pipeline.model.generation_config.eos_token_id
        ends = set(eos if isinstance(eos, list) else [eos])
        length = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
        text, stopped = cut_at_stop(str(pipeline.tokenizer.decode(tokens[:length], skip_special_tokens=True)), stops)
        return cls(tokens[:length], text, stopped or length is not None)


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first complete stop, as a stream would find it, and whether there was one."""
    places = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)[1]], True) if places else (text, False)


def settled(text: str, stops: Sequence[str]) -> str:
    """The part of a growing text that is final: without a possible beginning of a stop, or of a character."""
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held].rstrip("\N{REPLACEMENT CHARACTER}")


class NewTokens(StoppingCriteria):
    """Keeps each row's new tokens, and ends a row that has a stop in its text or was cancelled.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): decodes the tokens.
        prompt_length (`int`): the length of the padded prompts, after which the new tokens begin.
        stops (`Sequence[str]`): texts that end a row.
        cancelled (`Sequence[threading.Event]`): one for each row; once set, the row ends with its next token.
        progress (`Sequence[Callable]`, *optional*): one for each row, called after each new token with all of them.
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
        """The new tokens of each row, without padding after its end."""
        self.stopped: set[int] = set()

    def text(self, tokens: list[int]) -> str:
        """The text of new tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        for i, row in enumerate(input_ids[:, self.prompt_length :].tolist()):
            if i in self.stopped:
                continue  # only padding from now on, while other rows continue
            self.rows[i] = row
            if self.progress:
                self.progress[i](row)
            if self.cancelled[i].is_set() or (self.stops and cut_at_stop(self.text(row), self.stops)[1]):
                self.stopped.add(i)
        return torch.tensor([i in self.stopped for i in range(len(input_ids))], device=input_ids.device)
