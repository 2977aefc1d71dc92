"""Associative retrieval (GradMem, section 4.1): random pairs are written, then the value of a key is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import pydantic
import torch
from transformers import PreTrainedTokenizerFast

from evaluation.data import Rows
from evaluation.key_values import EDGE, MOST_PAIRS, as_rows, pairs_tokenizer, sample_pairs
from gradmem_adapter.training import Batches

from .base import OPTIONS, Task

TARGETS = 4
"""Tokens of a target: a value of two characters, `!` and `|`."""
Several = Annotated[tuple[pydantic.PositiveInt, ...], pydantic.Field(min_length=1)]


@pydantic.dataclasses.dataclass(frozen=True, config=OPTIONS)
class Mix:
    """One kind of batch in a stage.

    Args:
        max_pairs (`int`): pairs of the longest context.
        contexts (`int`): of a batch.
        queries (`int`): on each context.
        min_pairs (`int`, *optional*, defaults to `max_pairs`): each context draws its number of pairs.
        write_steps (`tuple[int, ...]`, *optional*, defaults to `(1,)`): K, or passes, is drawn from these.
        share (`float`, *optional*, defaults to `1.0`): of the stage, against its other mixes.
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
            raise ValueError(f"min_pairs must lie in 1 to max_pairs ({self.max_pairs}), got {self.min_pairs}.")


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
        pairs (`int`, *optional*, defaults to `16`): of a context that is measured.
        contexts (`int`, *optional*, defaults to `128`): that are measured.
        queries (`int`, *optional*, defaults to `16`): on each, at most as many as there are pairs.
        seed (`int`, *optional*, defaults to `1`): of the contexts that are measured.
        stages (`tuple[Stage, ...]`, *optional*): of training.
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
        """Random pairs."""
        return "pairs"

    @property
    def settings(self) -> dict[str, Any]:
        """How many pairs a context has."""
        return {"pairs": self.pairs}

    @property
    def write_steps(self) -> tuple[int, ...]:
        """Of all stages."""
        return tuple(k for stage in self.stages for mix in stage.mix for k in mix.write_steps)

    @property
    def steps(self) -> int | None:
        """Of all stages; None where there is none."""
        return sum(stage.steps for stage in self.stages) or None

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per character."""
        return pairs_tokenizer()

    def rows(self, split: str) -> Rows:
        """Fresh contexts, of whatever split."""
        generator = torch.Generator().manual_seed(self.seed)
        return as_rows(sample_pairs(self.contexts, min(self.queries, self.pairs), self.pairs, generator=generator))

    def batches(self, seed: int, write_steps: tuple[int, ...]) -> PairBatches:
        """Pairs made on the device.

        Raises:
            ValueError: there is no stage.
        """
        if not self.stages:
            raise ValueError("kv_retrieval needs at least one stage to train.")
        return PairBatches(self.stages, write_steps, seed)

    def score(self, answer: str, accepted: list[str]) -> dict[str, float]:
        """Whether the answer begins with the value, which ends at the first `!`."""
        return {"exact_match": float(answer.split(EDGE)[0] == accepted[0].split(EDGE)[0])}


class PairBatches(Batches):
    """Stage after stage; the mix and the write steps of a batch are drawn by the number of its step.

    Args:
        stages (`Sequence[Stage]`): of training.
        write_steps (`Sequence[int]`, *optional*): draw K from these, whatever a mix says.
        seed (`int`, *optional*, defaults to `0`): of what is drawn.
    """

    def __init__(self, stages: Sequence[Stage], write_steps: Sequence[int] = (), seed: int = 0) -> None:
        super().__init__(seed=seed, steps=sum(stage.steps for stage in stages))
        self.stages, self.write_steps = stages, write_steps

    def stage_at(self, step: int) -> Stage:
        """The stage that a step belongs to; after the end it is the last."""
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
        """That of the step's stage."""
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
        raise ValueError(f"{pairs} unique keys do not exist: there are {MOST_PAIRS}.")
