"""A curriculum: stages of training, each with its own data and its own range of write steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from torch.utils.data import Dataset


@dataclass(frozen=True)
class Stage:
    """A part of a curriculum.

    Attributes:
        dataset: rows by index (anything with a length).
        steps: for how many optimizer steps.
        write_steps: (min, max) of K in this stage; None: as the training arguments say.
    """

    dataset: Any
    steps: int
    write_steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.dataset, "__len__") or not hasattr(self.dataset, "__getitem__"):
            raise TypeError(
                f"A stage needs a dataset with a length and rows by index, got {type(self.dataset).__name__}."
            )
        if len(self.dataset) == 0:
            raise ValueError("The dataset of a stage is empty.")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"A stage's steps must be an integer from 1, got {self.steps!r}.")
        if self.write_steps is not None:
            pair = self.write_steps if isinstance(self.write_steps, Sequence) else ()
            if len(pair) != 2 or not all(type(value) is int for value in pair) or not 0 <= pair[0] <= pair[1]:
                raise ValueError(
                    "A stage's write_steps must be (min, max), integers with 0 <= min <= max, got "
                    f"{self.write_steps!r}."
                )


class Curriculum:
    """Stages that follow each other, the `train_dataset` of a `GradMemTrainer`.

    An optimizer step never takes rows of two stages. Within a stage rows come in a random order that the seed fixes;
    where a stage needs more rows than its dataset has, a new order of the whole dataset follows.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages or not all(isinstance(stage, Stage) for stage in stages):
            raise ValueError("A curriculum needs a list of one or more Stage(dataset, steps).")
        self.stages = list(stages)
        self.ends = list(accumulate(stage.steps for stage in self.stages))
        """The optimizer step after the last of each stage."""

    @property
    def steps(self) -> int:
        """The optimizer steps of all stages together."""
        return self.ends[-1]

    def stage_at(self, step: int) -> int:
        """The number of the stage of an optimizer step, counted from 0; after the end it is the last."""
        return next((number for number, end in enumerate(self.ends) if step < end), len(self.stages) - 1)

    def plan(self, rows_per_step: int, seed: int) -> Plan:
        """All rows in the order of training, for steps that take `rows_per_step` rows over all processes."""
        return Plan(self, rows_per_step, seed)


class _Order(NamedTuple):
    stage: int
    lap: int
    indices: list[int]


class Plan(Dataset[Any]):
    """The rows of a curriculum in the order of training, to be read in sequence."""

    def __init__(self, curriculum: Curriculum, rows_per_step: int, seed: int) -> None:
        self.curriculum, self.rows_per_step, self.seed = curriculum, rows_per_step, seed
        self._order: _Order | None = None
        """The one in use; the rows are read in sequence."""

    def __len__(self) -> int:
        return self.curriculum.steps * self.rows_per_step

    def __getitem__(self, index: int) -> Any:
        stage, lap, place = self.locate(index)
        if self._order is None or self._order[:2] != (stage, lap):
            indices = list(range(len(self.curriculum.stages[stage].dataset)))
            random.Random(f"{self.seed}:{stage}:{lap}").shuffle(indices)
            self._order = _Order(stage, lap, indices)
        return self.curriculum.stages[stage].dataset[self._order.indices[place]]

    def locate(self, index: int) -> tuple[int, int, int]:
        """The stage of a row, which time round its dataset it is, and its place in that round."""
        number = self.curriculum.stage_at(index // self.rows_per_step)
        stage = self.curriculum.stages[number]
        first = (self.curriculum.ends[number] - stage.steps) * self.rows_per_step
        return number, *divmod(index - first, len(stage.dataset))
