"""Associative retrieval (GradMem, section 4.1): random pairs are written, then queries ask for the values of keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any

import pydantic
import torch
from transformers import PreTrainedTokenizerFast

from evaluation.data import Rows
from evaluation.key_values import EDGE, MOST_PAIRS, as_rows, context_length, pairs_tokenizer, sample_pairs
from gradmem_adapter.training import Batches

from .base import OPTIONS, Task

TARGETS = 4
"""Tokens of a target: a value of two characters, `!` and `|`."""
Several = Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)]


@pydantic.dataclasses.dataclass(frozen=True, config=OPTIONS)
class Mix:
    """One kind of batch in a stage.

    Args:
        max_pairs (`int`): the number of pairs in the longest context.
        contexts (`int`): contexts per batch.
        queries (`int`): queries on each context.
        min_pairs (`int`, *optional*, defaults to `max_pairs`): each context draws its number of pairs from here to
            `max_pairs`.
        write_steps (`tuple[int, ...]`, *optional*, defaults to `(1,)`): K (or the number of passes) is one of these.
        share (`float`, *optional*, defaults to `1.0`): the share of the stage, relative to its other mixes.
    """

    max_pairs: pydantic.PositiveInt
    contexts: pydantic.PositiveInt
    queries: pydantic.PositiveInt
    min_pairs: pydantic.PositiveInt | None = None
    write_steps: Several = (1,)
    share: pydantic.NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        _check_pairs(self.max_pairs)
        if self.min_pairs is not None and self.min_pairs > self.max_pairs:
            raise ValueError(f"min_pairs must be from 1 to max_pairs ({self.max_pairs}), got {self.min_pairs}.")


@pydantic.dataclasses.dataclass(frozen=True, config=OPTIONS)
class Stage:
    """`steps` training steps on a mix of batches, at `lr_factor` times the learning rate of the run."""

    steps: pydantic.PositiveInt
    mix: Annotated[tuple[Mix, ...], pydantic.Field(min_length=1)]
    lr_factor: pydantic.PositiveFloat = 1.0


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class KVRetrieval(Task):
    """Contexts of exactly `pairs` pairs are measured; training follows `stages`, a curriculum over pairs.

    Args:
        pairs (`int`, *optional*, defaults to `16`): pairs in each measured context.
        contexts (`int`, *optional*, defaults to `128`): the number of measured contexts.
        queries (`int`, *optional*, defaults to `16`): queries on each, at most as many as there are pairs.
        seed (`int`, *optional*, defaults to `1`): seed of the measured contexts.
        stages (`tuple[Stage, ...]`, *optional*): the stages of training.
    """

    pairs: pydantic.PositiveInt = 16
    contexts: pydantic.PositiveInt = 128
    queries: pydantic.PositiveInt = 16
    seed: int = 1
    stages: tuple[Stage, ...] = ()

    name = "kv_retrieval"
    max_new_tokens = TARGETS

    def __post_init__(self) -> None:
        _check_pairs(self.pairs)

    @property
    def dataset(self) -> str:
        """The name of these random pairs."""
        return "pairs"

    @property
    def settings(self) -> dict[str, Any]:
        """The number of pairs in a context."""
        return {"pairs": self.pairs}

    @property
    def write_steps(self) -> tuple[int, ...]:
        """The write steps of all stages."""
        return tuple(k for stage in self.stages for mix in stage.mix for k in mix.write_steps)

    @property
    def steps(self) -> int | None:
        """The training steps of all stages; None if there are no stages."""
        return sum(stage.steps for stage in self.stages) or None

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per character."""
        return pairs_tokenizer()

    def rows(self, split: str) -> Rows:
        """Random contexts, the same for every split."""
        generator = torch.Generator().manual_seed(self.seed)
        return as_rows(sample_pairs(self.contexts, min(self.queries, self.pairs), self.pairs, generator=generator))

    def batches(self, seed: int, write_steps: tuple[int, ...]) -> PairBatches:
        """Batches of pairs, generated on the device.

        Raises:
            ValueError: there are no stages.
        """
        if not self.stages:
            raise ValueError("kv_retrieval needs at least one stage to train.")
        return PairBatches(self.stages, write_steps, seed)

    def score(self, answer: str, accepted: list[str]) -> dict[str, float]:
        """Whether the answer up to the first `!` is the value."""
        return {"exact_match": float(answer.split(EDGE)[0] == accepted[0].split(EDGE)[0])}


class PairBatches(Batches):
    """Batches of all stages in order. The number of a step determines the mix and the write steps of its batch.

    Args:
        stages (`Sequence[Stage]`): the stages of training.
        write_steps (`Sequence[int]`, *optional*): draw K from these instead of from the mix.
        seed (`int`, *optional*, defaults to `0`): seed for all draws.
    """

    def __init__(self, stages: Sequence[Stage], write_steps: Sequence[int] = (), seed: int = 0) -> None:
        super().__init__(seed=seed, steps=sum(stage.steps for stage in stages))
        self.stages, self.write_steps = stages, write_steps

    @cached_property
    def trained_length(self) -> int:
        """See `Batches.trained_length`."""
        return context_length(max(mix.max_pairs for stage in self.stages for mix in stage.mix))

    def stage_at(self, step: int) -> Stage:
        """The stage of a step; after the end, the last stage."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def kind_at(self, step: int) -> tuple[Mix, int]:
        """The mix of a step's batch and its write steps."""
        draw, mix = self.choices(step), self.stage_at(step).mix
        chosen = draw.choices(mix, [part.share for part in mix])[0]
        return chosen, draw.choice(self.write_steps or chosen.write_steps)

    def lr_factor(self, step: int) -> float:
        """The `lr_factor` of the step's stage."""
        return self.stage_at(step).lr_factor

    def batch(self, step: int, device: torch.device) -> dict[str, Any]:
        """See `Batches.batch`."""
        mix, write_steps = self.kind_at(step)
        generator = self.generator(step, device)
        pairs = sample_pairs(
            mix.contexts, mix.queries, mix.max_pairs, mix.min_pairs, device=device, generator=generator
        )
        return pairs | {"write_steps": write_steps, "max_targets": TARGETS}


def _check_pairs(pairs: int) -> None:
    if pairs > MOST_PAIRS:
        raise ValueError(f"The number of pairs must be at most {MOST_PAIRS}, the number of unique keys, got {pairs}.")
