"""Sampling with a generator for each row, so that calls with different seeds can share a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

_GREEDY_BELOW = 1e-4
"""Lower temperatures count as greedy: only the best token is likely, and dividing scores by them could overflow."""


class Sampling(NamedTuple):
    """How tokens are drawn.

    Args:
        temperature (`float`, *optional*): the temperature; None or below 1e-4: greedy.
        top_p (`float`, *optional*): nucleus sampling; None: all tokens.
    """

    temperature: float | None
    top_p: float | None

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy."""
        return self.temperature is None or self.temperature < _GREEDY_BELOW

    def options(self) -> dict[str, Any]:
        """The same as arguments of `generate`, for engines, which sample by themselves."""
        if self.greedy:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": self.top_p or 1.0}

    def processors(self, seeds: Sequence[int], device: torch.device) -> LogitsProcessorList:
        """Logits processors with which greedy decoding samples; none for greedy answers."""
        processors = LogitsProcessorList()
        if self.greedy:
            return processors
        processors.append(TemperatureLogitsWarper(cast(float, self.temperature)))
        if self.top_p is not None and self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        processors.append(_Draw(seeds, device))
        return processors


class _Draw(LogitsProcessor):
    """Adds Gumbel noise, so that the highest score is a sample from the distribution (Gumbel-max trick).

    Transformers samples with the process's global generator, which all threads share.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        waits = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(waits, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - waits.log().to(scores.dtype)
