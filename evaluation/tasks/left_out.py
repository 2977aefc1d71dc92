"""Whether memory tells that a long text does not answer: questions with and without the paragraph that answers them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import pydantic
import torch

from evaluation.articles import articles, drawn, into_segments, paragraphs
from evaluation.data import by_words
from evaluation.scores import placements
from gradmem_adapter.segments import Segment

from .base import OPTIONS, ArticleTask, Measurement

if TYPE_CHECKING:
    from evaluation.run import Answerer

THRESHOLDS = (0.5, 0.9, 0.97)
"""A question counts as refused if its support is below the threshold; all of these are measured."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class LeftOut(ArticleTask):
    """Every question is asked of the segments of its article, and again without those of the paragraph that answers it.
    The rest is about the same subject, which makes this harder than asking another text.
    """

    name = "left_out"

    @property
    def settings(self) -> dict[str, Any]:
        """How an article is read."""
        return {"segment_tokens": self.segment_tokens, "questions": self.questions}

    def measure(
        self, answerer: Answerer, split: str, *, states: int = 1, limit: int | None = None, seed: int = 0
    ) -> Measurement:
        """The area under the ROC curve of `support` from `GradMemPipeline.select`, and the shares of questions with and
        without their paragraph that are below each of `THRESHOLDS`. No answers are computed.

        Raises:
            TypeError: the model has no memory states.
            ValueError: the adapter was not trained to refuse, or the length of segments is not known.
        """
        if not answerer.pipeline.refuses:
            raise ValueError("The task left_out needs an adapter that was trained to refuse.")
        draw = random.Random(seed)
        lines: list[dict[str, Any]] = []
        for row in articles(self.source, split)[:limit]:
            cut, places = into_segments(row["context"], answerer, self.segment_tokens), paragraphs(row["context"])
            answerer.states([piece.text for piece in cut])  # in large batches
            for question in drawn(row["questions"], self.questions, draw):
                start, end = places[question["para"]]
                others = [piece for piece in cut if piece.end <= start or piece.start >= end]
                both = (_support(answerer, question["query"], pieces, states) for pieces in (cut, others))
                lines.append({"query": question["query"]} | dict(zip(("whole", "left_out"), both, strict=True)))
        lengths = [len(ids) for ids in answerer.tokenizer(list(answerer.written))["input_ids"]]
        whole, left_out = (torch.tensor([line[of] for line in lines]).double() for of in ("whole", "left_out"))
        return Measurement(
            {"auc": placements(whole, left_out)}
            | {f"whole_below_{t}": (whole < t).double() for t in THRESHOLDS}
            | {f"left_out_below_{t}": (left_out < t).double() for t in THRESHOLDS},
            {"context_tokens": sum(lengths) / len(lengths)},
            {"checkpoint": answerer.checkpoint},
            lines,
        )


def _support(answerer: Answerer, query: str, pieces: Sequence[Segment], states: int) -> float:
    """The support of the state that a question is answered from: the likeliest of those that share words with it. 0 if
    there is none."""
    if not pieces:
        return 0.0
    found = by_words([piece.text for piece in pieces], [query], states)[0]
    memory = answerer.states([pieces[i].text for i in found])
    chosen = answerer.pipeline.select(query, memory=memory, search_scores=list(found.values()), support=True)
    return cast(float, chosen.support)  # never None for an adapter that refuses
