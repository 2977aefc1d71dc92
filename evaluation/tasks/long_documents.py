"""Questions about articles of thousands of words, each asked of selected pieces of its article."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pydantic
import torch

from evaluation.articles import articles, drawn, into_segments, paragraphs
from evaluation.data import by_words
from gradmem_adapter.segments import Segment
from gradmem_adapter.state import MemoryState
from gradmem_adapter.write.options import WriteOptions

from .base import OPTIONS, ArticleTask, Measurement

if TYPE_CHECKING:
    from evaluation.run import Answerer

_ROOM = 256
"""Positions left for question and answer if an article is cut to the model's length."""


class Asked(NamedTuple):
    """A question, the pieces that it is asked of with their search scores, and the number of the right piece."""

    query: str
    accepted: list[str]
    reads: dict[int, float]
    right: int


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class LongDocuments(ArticleTask):
    """Articles with all questions on them.

    Args:
        pieces (`str`, *optional*, defaults to `"segments"`): how an article is read: in `"segments"`, in
            `"paragraphs"`, as a `"whole"` that is cut to the model's length, or as one state that is written segment by
            segment (`"sequential"`).
        chosen (`str`, *optional*, defaults to `"words"`): which pieces a question is asked of: as many as `states`, by
            `"words"`, as `MemoryStore.choose` finds them; or the `"right"` piece.
        alone (`bool`, *optional*, defaults to `False`): ask only the chosen piece whose state most likely holds an
            answer (`GradMemPipeline.select`), not all side by side. For adapters that were trained to refuse.
    """

    pieces: Literal["segments", "paragraphs", "whole", "sequential"] = "segments"
    chosen: Literal["words", "right"] = "words"
    alone: bool = False

    name = "long_documents"

    @property
    def settings(self) -> dict[str, Any]:
        """How an article is read."""
        given = {"segment_tokens": self.segment_tokens, "questions": self.questions, "alone": self.alone or None}
        return {"pieces": self.pieces, "chosen": self.chosen} | {k: v for k, v in given.items() if v is not None}

    def measure(
        self, answerer: Answerer, split: str, *, states: int = 1, limit: int | None = None, seed: int = 0
    ) -> Measurement:
        """See `Task.measure`. In addition to the scores of answers, `found` says whether the right piece was asked.

        Raises:
            ValueError: the length of segments is not known; or there is only one piece, but `states` is more than 1.
            TypeError: `alone` and `"sequential"` need memory states, and the model has none.
        """
        if states > 1 and (self.chosen == "right" or self.pieces in ("whole", "sequential")):
            raise ValueError(f"A whole article, or the right piece, is only one piece: use 1 state, not {states}.")
        draw = random.Random(seed)
        pieces: list[str] = []
        asked: list[Asked] = []
        for row in articles(self.source, split)[:limit]:
            questions = drawn(row["questions"], self.questions, draw)
            cut = self._cut(answerer, row["context"])
            asked += self._asked(row["context"], questions, cut, len(pieces), states)
            pieces += [piece.text for piece in cut]
        answers = self._answers(answerer, pieces, asked)
        scores = [self.score(answer, question.accepted) for answer, question in zip(answers, asked, strict=True)]
        lengths = [len(ids) for ids in answerer.tokenizer(pieces, verbose=False)["input_ids"]]
        found = [float(question.right in question.reads) for question in asked]
        return Measurement(
            {name: torch.tensor([s[name] for s in scores], dtype=torch.float64) for name in scores[0]}
            | {"found": torch.tensor(found, dtype=torch.float64)},
            {"context_tokens": sum(lengths) / len(lengths)},
            {"checkpoint": answerer.checkpoint},
            [
                {"query": question.query, "answer": answer, "accepted": question.accepted, "found": own, **values}
                for question, answer, own, values in zip(asked, answers, found, scores, strict=True)
            ],
        )

    def _asked(
        self, text: str, questions: Sequence[Any], pieces: Sequence[Segment], before: int, states: int
    ) -> list[Asked]:
        places = paragraphs(text)
        right = [_holding(pieces, *places[question["para"]]) for question in questions]
        queries = [question["query"] for question in questions]
        reads = (
            [{i: 1.0} for i in right]
            if self.chosen == "right"
            else by_words([piece.text for piece in pieces], queries, states)
        )
        return [
            Asked(
                question["query"], question["answers"], {before + i: score for i, score in read.items()}, before + own
            )
            for question, read, own in zip(questions, reads, right, strict=True)
        ]

    def _cut(self, answerer: Answerer, text: str) -> list[Segment]:
        if self.pieces == "paragraphs":
            return [Segment(text[start:end], start, end, 0) for start, end in paragraphs(text)]
        if self.pieces == "whole":
            room = answerer.backbone.config.get_text_config().max_position_embeddings - _ROOM
            kept = answerer.tokenizer(text, truncation=True, max_length=room, return_offsets_mapping=True)
            text = text[: max(end for _, end in kept["offset_mapping"])]
        if self.pieces in ("whole", "sequential"):
            return [Segment(text, 0, len(text), 0)]
        return into_segments(text, answerer, self.segment_tokens)

    def _answers(self, answerer: Answerer, pieces: Sequence[str], asked: Sequence[Asked]) -> list[str]:
        """The answer to each question. Only the pieces that are asked are read."""
        used = sorted({i for question in asked for i in question.reads})
        texts, queries = [pieces[i] for i in used], [question.query for question in asked]
        reads = [[used.index(i) for i in question.reads] for question in asked]
        if not self.alone and self.pieces != "sequential":
            return answerer.answer(texts, queries, reads, max_new_tokens=self.max_new_tokens)
        memory = self._memory(answerer, texts)
        if self.alone:
            reads = answerer.surest(memory, queries, reads, [list(question.reads.values()) for question in asked])
        return answerer.ask(memory, [memory.num_memory_tokens] * len(memory), queries, reads, self.max_new_tokens)

    def _memory(self, answerer: Answerer, texts: list[str]) -> MemoryState:
        if self.pieces != "sequential":
            return answerer.states(texts)
        options = WriteOptions(steps=answerer.steps, last_loss=False)
        documents = [
            answerer.pipeline.write_document(text, "sequential", segment_tokens=self.segment_tokens, options=options)
            for text in texts
        ]
        return MemoryState.stack([document.states for document in documents])


def _holding(pieces: Sequence[Segment], start: int, end: int) -> int:
    """The number of the piece that has most of a part of the text."""
    return max(range(len(pieces)), key=lambda i: min(pieces[i].end, end) - max(pieces[i].start, start))
