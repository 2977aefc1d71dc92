"""Sampling with a generator for each row, so that calls under a seed need not wait for each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

_GREEDY_BELOW = 1e-4
"""Temperatures that scores are not divided by: nothing but the best token is likely, and they could overflow."""


class Sampling(NamedTuple):
    """How tokens are drawn.

    Args:
        temperature (`float`, *optional*): None or below 1e-4: greedily.
        top_p (`float`, *optional*): nucleus; None: all tokens.
    """

    temperature: float | None
    top_p: float | None

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken each time."""
        return self.temperature is None or self.temperature < _GREEDY_BELOW

    def options(self) -> dict[str, Any]:
        """The same as `generate` takes it, for engines, which draw by themselves."""
        if self.greedy:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": self.top_p or 1.0}

    def processors(self, seeds: Sequence[int | None], device: torch.device) -> LogitsProcessorList:
        """What makes greedy decoding draw; nothing for greedy answers.

        Args:
            seeds (`Sequence[int]`): of each row; None: one that nobody knows.
            device (`torch.device`): where the logits are.
        """
        processors = LogitsProcessorList()
        if self.greedy:
            return processors
        processors.append(TemperatureLogitsWarper(cast(float, self.temperature)))
        if self.top_p is not None and self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        processors.append(_Draw(seeds, device))
        return processors


class _Draw(LogitsProcessor):
    """Adds Gumbel noise, after which the highest score is a draw from the distribution (Gumbel-max trick).

    Transformers draws from the process's own generator, which threads share.
    """

    def __init__(self, seeds: Sequence[int | None], device: torch.device) -> None:
        self.generators = [torch.Generator(device) for _ in seeds]
        for generator, seed in zip(self.generators, seeds, strict=True):
            if seed is None:
                generator.seed()
            else:
                generator.manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        waits = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(waits, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - waits.log().to(scores.dtype)
