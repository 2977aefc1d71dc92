"""Questions about passages: FairytaleQA, SQuAD, and any data in the form of either."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
import torch

from evaluation.data import Rows, joined
from evaluation.unanswerable import REFUSAL, with_unanswerable, without_answers
from gradmem_adapter.prompts import Prompt
from gradmem_adapter.store.files import Dtype
from gradmem_adapter.training.metrics import score_answer
from gradmem_adapter.utils.state_file import narrowed, widened

from .base import OPTIONS, Measurement, QuestionTask

if TYPE_CHECKING:
    from evaluation.run import Answerer


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Passages(QuestionTask):
    """Passages with all questions on them.

    Args:
        joined (`int`, *optional*, defaults to `1`): in training, a context consists of one to this many consecutive
            passages.
        unanswerable (`float`, *optional*, defaults to `0`): this share of the questions comes from other passages, and
            the right answer is "not in memory". In addition to the scores of the others, the shares of both kinds with
            this answer are measured: `right_refusals` and `false_refusals`.
        nearby (`bool`, *optional*, defaults to `False`): take these questions from passages near this one, usually of
            the same article, and only if their answers do not occur in it. In training, every second one is nearby.
        removed (`float`, *optional*, defaults to `0`): remove from this share of the contexts a sentence that answers a
            question. Questions that only this sentence answered are then to be refused, and counted as above; they are
            on the subject of the context.
        alone (`bool`, *optional*, defaults to `False`): of several states, ask only the one that most likely holds an
            answer, not all side by side. For adapters that were trained to refuse.
        kept (`str`, *optional*): round states to the dtype in which a memory store would keep them: "float32",
            "bfloat16" or "int8"; None: as they were written.
    """

    joined: pydantic.PositiveInt = 1
    unanswerable: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    nearby: bool = False
    removed: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    alone: bool = False
    kept: Dtype | None = None

    name = "passages"

    def __post_init__(self) -> None:
        if self.nearby and not self.unanswerable:
            raise ValueError("nearby needs unanswerable questions: set unanswerable to their share.")

    @property
    def settings(self) -> dict[str, Any]:
        """See `Task.settings`."""
        given = {name: getattr(self, name) for name in ("unanswerable", "nearby", "removed", "alone", "kept")}
        return {name: value for name, value in given.items() if value}

    def rows(self, split: str) -> Rows:
        """See `Task.rows`.

        Raises:
            ValueError: `unanswerable` needs questions of other passages, but there is only one.
        """
        return self._asked(self._passages(split), split, float(self.nearby))

    def training_rows(self) -> Rows:
        """See `Task.training_rows`. Raises `ValueError` as `rows` does."""
        return self._asked(joined(self._passages("train"), self.joined), "train", self.nearby / 2)

    def _asked(self, contexts: Rows, split: str, near: float) -> Rows:
        if self.unanswerable and len(contexts) < 2:
            raise ValueError(
                f"unanswerable={self.unanswerable} needs questions of other passages, but the split {split!r} of "
                f"{self.source!r} makes only one context. Add passages, join fewer to one context (joined), or leave "
                "unanswerable out."
            )
        return with_unanswerable(contexts, self.unanswerable, near)

    def _passages(self, split: str) -> Rows:
        return without_answers(super().rows(split), self.removed)

    def answers(
        self, answerer: Answerer, contexts: Sequence[str], queries: Sequence[Prompt], reads: Sequence[Sequence[int]]
    ) -> list[str]:
        """See `Task.answers`."""
        if not self.alone and self.kept is None:
            return super().answers(answerer, contexts, queries, reads)
        memory = answerer.states(contexts)
        if self.kept is not None:
            vectors = widened(narrowed(memory.vectors, self.kept))["vectors"].float()
            memory = dataclasses.replace(memory, vectors=vectors)
        lengths = [memory.num_memory_tokens] * len(memory)
        read = answerer.surest(memory, queries, reads) if self.alone else reads
        return answerer.ask(memory, lengths, queries, read, self.max_new_tokens)

    def measure(
        self, answerer: Answerer, split: str, *, states: int = 1, limit: int | None = None, seed: int = 0
    ) -> Measurement:
        """See `Task.measure`."""
        found = super().measure(answerer, split, states=states, limit=limit, seed=seed)
        if not self.unanswerable and not self.removed:
            return found
        refused = torch.tensor([score_answer(line["answer"], [REFUSAL])["exact_match"] for line in found.answers])
        other = torch.tensor([line["accepted"] == [REFUSAL] for line in found.answers])
        values = {name: value[~other] for name, value in found.values.items()}
        refusals = {"right_refusals": refused[other], "false_refusals": refused[~other]}
        return dataclasses.replace(found, values=values | refusals)
