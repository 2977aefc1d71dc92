"""The base class of tasks: texts to train on, questions to answer, and scores of answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pydantic
import torch
from torch import Tensor

from evaluation.articles import articles
from evaluation.data import Rows, distractors, group, qa_rows, questions
from evaluation.scores import score_texts
from gradmem_adapter.prompts import Prompt

if TYPE_CHECKING:
    from evaluation.run import Answerer
    from gradmem_adapter.training import Batches

OPTIONS = pydantic.ConfigDict(extra="forbid")


@dataclass
class Measurement:
    """The results of a task for a model."""

    values: dict[str, Tensor]
    """Scores by name, one number for each item, [n]; their means are reported."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Other information about the data, such as the mean length of a context."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that distinguish measurements, in addition to the task's own."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Every query with its answer, the accepted answers, and its scores."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Task(ABC):
    """A task; its fields are its options in a run's YAML.

    Args:
        share (`float`, *optional*, defaults to `1.0`): the task's share of training, relative to other tasks.
    """

    share: pydantic.NonNegativeFloat = 1.0

    name: ClassVar[str]
    """The task's name in YAML."""
    measured: ClassVar[bool] = True
    """Whether the task can be measured; otherwise it is only for training."""
    max_new_tokens: ClassVar[int] = 32
    """The most tokens in an answer."""

    @property
    @abstractmethod
    def dataset(self) -> str:
        """The name of the data in tables."""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that distinguish measurements on the same data set."""
        return {}

    @property
    def write_steps(self) -> tuple[int, ...]:
        """The numbers of write steps that the task's own batches draw from."""
        return ()

    @property
    def steps(self) -> int | None:
        """The number of the task's own batches; None: as many as training asks for."""
        return None

    @abstractmethod
    def rows(self, split: str) -> Rows:
        """Contexts with questions from the split "train", "valid" or "test"."""

    def training_rows(self) -> Rows:
        """The rows to train on, each context once."""
        return self.rows("train")

    def batches(self, seed: int, write_steps: tuple[int, ...]) -> Batches | None:
        """Batches that the task draws itself; None: batches are made of `training_rows`, mixed with other tasks'.

        Args:
            seed (`int`): seed for all draws.
            write_steps (`tuple[int, ...]`): draw the write steps from these instead of the task's own; empty: its own.
        """
        return None

    def tokenizer(self) -> Any:
        """The tokenizer for a backbone that is trained from scratch.

        Raises:
            ValueError: the task needs a pretrained backbone.
        """
        raise ValueError(f"The task {self.name} needs a pretrained backbone: name a directory or a model on the hub.")

    def score(self, answer: str, accepted: list[str]) -> dict[str, float]:
        """The scores of an answer, by name."""
        return score_texts(answer, accepted)

    def answers(
        self, answerer: Answerer, contexts: Sequence[str], queries: Sequence[Prompt], reads: Sequence[Sequence[int]]
    ) -> list[str]:
        """The answer to each question, asked of the contexts of its row in `reads`, side by side."""
        return answerer.answer(contexts, queries, reads, max_new_tokens=self.max_new_tokens)

    def measure(
        self, answerer: Answerer, split: str, *, states: int = 1, limit: int | None = None, seed: int = 0
    ) -> Measurement:
        """Answer all questions greedily and score them.

        Args:
            answerer (`Answerer`): the model.
            split (`str`): the split of the data.
            states (`int`, *optional*, defaults to `1`): how many contexts each question is asked of, side by side.
            limit (`int`, *optional*): the most contexts.
            seed (`int`, *optional*, defaults to `0`): seed for drawing the other contexts.
        """
        contexts, queries, index, references = questions(self.rows(split)[:limit])
        reads = distractors(index, len(contexts), states, seed)
        answers = self.answers(answerer, contexts, queries, reads)
        scores = [self.score(answer, accepted) for answer, accepted in zip(answers, references, strict=True)]
        lengths = [len(ids) for ids in answerer.tokenizer(contexts)["input_ids"]]
        return Measurement(
            {name: torch.tensor([s[name] for s in scores], dtype=torch.float64) for name in scores[0]},
            {"context_tokens": sum(lengths) / len(lengths)},
            answers=[
                {"query": query, "answer": answer, "accepted": accepted, **values}
                for query, answer, accepted, values in zip(queries, answers, references, scores, strict=True)
            ],
        )


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class QuestionTask(Task):
    """A task on passages with questions, from any source.

    Args:
        source (`str`): a directory or a dataset on the hub, see `qa_rows`.
        hub (`dict`, *optional*): other arguments of `datasets.load_dataset`: name, revision, ...
    """

    source: str
    hub: dict[str, Any] = field(default_factory=dict)

    @property
    def dataset(self) -> str:
        """The last part of the source."""
        return self.source.rstrip("/").rpartition("/")[2]

    def rows(self, split: str) -> Rows:
        """See `Task.rows`."""
        return qa_rows(self.source, split, **self.hub)


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class ArticleTask(Task):
    """A task on articles of thousands of words, with all questions on them.

    Args:
        source (`str`): a directory, see `articles`.
        segment_tokens (`int`, *optional*): the most tokens in a segment; None: as for `pipeline.segments`.
        questions (`int`, *optional*): the most questions of each article, drawn by the seed; None: all.
    """

    source: str
    segment_tokens: pydantic.PositiveInt | None = None
    questions: pydantic.PositiveInt | None = None

    @property
    def dataset(self) -> str:
        """The source of the articles."""
        return "squad articles"

    def rows(self, split: str) -> Rows:
        """Whole articles, for a model that can read them."""
        return group(
            (row["context"], asked["query"], asked["answers"])
            for row in articles(self.source, split)
            for asked in row["questions"]
        )
