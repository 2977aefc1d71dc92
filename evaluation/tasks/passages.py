"""Questions about passages: FairytaleQA, SQuAD, and whatever has the form of either."""

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
        joined (`int`, *optional*, defaults to `1`): in training, a context is one to so many passages in a row.
        unanswerable (`float`, *optional*, defaults to `0`): this share of the questions are other passages', and "not
            in memory" is the answer. Measured are, beside the scores on the others, the shares of both kinds that are
            answered so: `right_refusals` and `false_refusals`.
        nearby (`bool`, *optional*, defaults to `False`): those questions come from passages near this one, of the same
            article as a rule, and only such whose answers do not occur in it. In training every second one does.
        removed (`float`, *optional*, defaults to `0`): this share of the contexts lack a sentence that answers a
            question, and what it alone answered is to be refused, and counted, as above: questions on what the context
            is about.
        alone (`bool`, *optional*, defaults to `False`): of several states ask the one that holds an answer most likely,
            not all side by side. For adapters that were trained to refuse.
        kept (`str`, *optional*): states are read as a memory store keeps them in this dtype: "float32", "bfloat16" or
            "int8"; None: as they were written.
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
            raise ValueError("nearby says where unanswerable questions come from: give unanswerable a share of them.")

    @property
    def settings(self) -> dict[str, Any]:
        """See `Task.settings`."""
        given = {name: getattr(self, name) for name in ("unanswerable", "nearby", "removed", "alone", "kept")}
        return {name: value for name, value in given.items() if value}

    def rows(self, split: str) -> Rows:
        """See `Task.rows`.

        Raises:
            ValueError: questions of other passages are to be asked, and there is no other passage.
        """
        return self._asked(self._passages(split), split, float(self.nearby))

    def training_rows(self) -> Rows:
        """See `Task.training_rows`. Raises `ValueError` as `rows` does."""
        return self._asked(joined(self._passages("train"), self.joined), "train", self.nearby / 2)

    def _asked(self, contexts: Rows, split: str, near: float) -> Rows:
        if self.unanswerable and len(contexts) < 2:
            raise ValueError(
                f"unanswerable={self.unanswerable} asks questions of other passages, and the split {split!r} of "
                f"{self.source!r} makes one context alone. Give it more passages, join fewer to one context (joined), "
                "or leave unanswerable out."
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
