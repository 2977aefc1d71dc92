"""Questions about articles of thousands of words, each asked of those pieces of its article that it seems to need."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import pydantic
import torch
from peft import PeftModel

from evaluation.data import Rows, group
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.segments import Segment, segments
from gradmem_adapter.store.choose import choose
from gradmem_adapter.store.entry import Entry
from gradmem_adapter.store.index import Index, insert
from gradmem_adapter.training.rows import json_lines

from .base import OPTIONS, Measurement, Task

if TYPE_CHECKING:
    from evaluation.run import Answerer

_ROOM = 256
"""Tokens of a model's positions that are left to question and answer, where an article is cut to what it takes."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class LongDocuments(Task):
    """Articles with all questions on them.

    Args:
        source (`str`): a directory with `squad_articles_<split>.jsonl.gz`, an article a line: `context`, whose
            paragraphs have empty lines between them, and `questions` with `query`, `answers` and `para`, the number of
            the paragraph that answers.
        pieces (`str`, *optional*, defaults to `"segments"`): what is read by itself: `"segments"` of an article, its
            `"paragraphs"`, or the `"whole"` of it, cut to what the model takes.
        segment_tokens (`int`, *optional*): most tokens of a segment; None: the adapter's trained length.
        chosen (`str`, *optional*, defaults to `"words"`): what a question is asked of: as many pieces as there are
            states to ask, by `"words"`, as `MemoryStore.choose` finds them; or the `"right"` piece.
        alone (`bool`, *optional*, defaults to `False`): ask each chosen piece by itself, and take the answer with the
            highest score, not all side by side. For the method gradmem.
        questions (`int`, *optional*): only so many questions of each article, drawn by the seed; None: all.
    """

    source: str
    pieces: Literal["segments", "paragraphs", "whole"] = "segments"
    segment_tokens: pydantic.PositiveInt | None = None
    chosen: Literal["words", "right"] = "words"
    alone: bool = False
    questions: pydantic.PositiveInt | None = None

    name = "long_documents"

    @property
    def dataset(self) -> str:
        """What they are articles of."""
        return "squad articles"

    @property
    def settings(self) -> dict[str, Any]:
        """How an article is read."""
        given = {"segment_tokens": self.segment_tokens, "questions": self.questions, "alone": self.alone or None}
        return {"pieces": self.pieces, "chosen": self.chosen} | {k: v for k, v in given.items() if v is not None}

    def articles(self, split: str) -> list[dict[str, Any]]:
        """The articles of a split, with their questions.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return [row for _, row in json_lines(Path(self.source) / f"squad_articles_{split}.jsonl.gz")]

    def rows(self, split: str) -> Rows:
        """Whole articles, for a model that takes them."""
        return group(
            (row["context"], asked["query"], asked["answers"])
            for row in self.articles(split)
            for asked in row["questions"]
        )

    def measure(
        self, answerer: Answerer, split: str, *, states: int = 1, limit: int | None = None, seed: int = 0
    ) -> Measurement:
        """See `Task.measure`. Beside the scores of the answers `found` says whether the right piece was asked.

        Raises:
            ValueError: the length of segments is not known.
            TypeError: `alone` asks for scores, and the model has no memory states.
        """
        draw = random.Random(seed)
        pieces: list[str] = []
        asked: list[
            tuple[str, list[str], list[int], int]
        ] = []  # question, accepted answers, pieces to ask, the right one
        for row in self.articles(split)[:limit]:
            cut = self._cut(answerer, row["context"])
            questions = row["questions"]
            if self.questions is not None and self.questions < len(questions):
                questions = draw.sample(questions, self.questions)
            right = [_holds(cut, *_paragraphs(row["context"])[question["para"]]) for question in questions]
            queries = [question["query"] for question in questions]
            reads = [[i] for i in right] if self.chosen == "right" else by_words(cut, queries, states)
            for question, read, own in zip(questions, reads, right, strict=True):
                places = [len(pieces) + i for i in read]
                asked.append((question["query"], question["answers"], places, len(pieces) + own))
            pieces += [piece.text for piece in cut]
        queries, accepted, reads, right = (list(column) for column in zip(*asked, strict=True))
        answers = self._answers(answerer, pieces, queries, reads)
        scores = [self.score(answer, known) for answer, known in zip(answers, accepted, strict=True)]
        values = {name: torch.tensor([s[name] for s in scores], dtype=torch.float64) for name in scores[0]}
        found = [own in read for own, read in zip(right, reads, strict=True)]
        lengths = [len(ids) for ids in answerer.tokenizer(pieces)["input_ids"]]
        return Measurement(
            values | {"found": torch.tensor(found, dtype=torch.float64)},
            {"context_tokens": sum(lengths) / len(lengths)},
            {"checkpoint": answerer.checkpoint},
            [
                {"query": query, "answer": answer, "accepted": known, "found": own, **values}
                for query, answer, known, own, values in zip(queries, answers, accepted, found, scores, strict=True)
            ],
        )

    def _cut(self, answerer: Answerer, text: str) -> list[Segment]:
        if self.pieces == "paragraphs":
            return [Segment(text[start:end], start, end, 0) for start, end in _paragraphs(text)]
        if self.pieces == "whole":
            room = answerer.backbone.config.get_text_config().max_position_embeddings - _ROOM
            return [next(segments(text, answerer.tokenizer, room))]
        config = getattr(answerer.model, "active_peft_config", None)
        limit = self.segment_tokens or getattr(config, "trained_length", None)
        if limit is None:
            raise ValueError("long_documents needs segment_tokens where the model does not say its trained length.")
        return list(segments(text, answerer.tokenizer, limit))

    def _answers(
        self, answerer: Answerer, pieces: Sequence[str], queries: list[str], reads: list[list[int]]
    ) -> list[str]:
        """The answer to each question; only pieces that are asked are read."""
        used = sorted({i for read in reads for i in read})
        reads, texts = [[used.index(i) for i in read] for read in reads], [pieces[i] for i in used]
        if not self.alone:
            return answerer.answer(texts, queries, reads, max_new_tokens=self.max_new_tokens)
        model = answerer.model
        if not isinstance(model, PeftModel):
            raise TypeError("alone asks for scores of answers from memory states: it needs the method gradmem.")
        ids = [list(row) for row in answerer.tokenizer(texts)["input_ids"]]
        memory = answerer.config.method.read(model, answerer.tokenizer, ids, answerer.steps)
        pipeline = GradMemPipeline(model, answerer.tokenizer)
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "return_scores": True}
        return [
            max(
                pipeline.generate([query] * len(read), memory=memory[read], **options), key=lambda answer: answer.score
            ).text.strip()
            for query, read in zip(queries, reads, strict=True)
        ]


def by_words(pieces: Sequence[Segment], queries: Sequence[str], k: int) -> list[list[int]]:
    """For each question the k pieces that `MemoryStore.choose` would find, the best first; the first pieces where no
    text has a word of it."""
    with TemporaryDirectory() as folder:
        index = Index(Path(folder))
        index.make()
        with index.writing() as connection:
            for i, piece in enumerate(pieces):
                insert(connection, [Entry(f"{i:032x}", text=piece.text)])
        found = [[int(choice.entry.key, 16) for choice in choose(index, "", query, k, None, None)] for query in queries]
    rest = range(min(k, len(pieces)))
    return [read + [i for i in rest if i not in read][: len(rest) - len(read)] for read in found]


def _paragraphs(text: str) -> list[tuple[int, int]]:
    """Where each begins and ends."""
    places, start = [], 0
    for paragraph in text.split("\n\n"):
        places.append((start, start + len(paragraph)))
        start += len(paragraph) + 2
    return places


def _holds(pieces: Sequence[Segment], start: int, end: int) -> int:
    """The piece that has most of a part of the text."""
    return max(range(len(pieces)), key=lambda i: min(pieces[i].end, end) - max(pieces[i].start, start))
