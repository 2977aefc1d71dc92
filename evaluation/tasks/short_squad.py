"""Short SQuAD (GradMem, section 4.3): a question on the one sentence of a passage that holds its answer."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pydantic

from evaluation.data import SENTENCE_END, Rows, group

from .base import OPTIONS, QuestionTask

_WORD = re.compile(r"\w+")


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class ShortSquad(QuestionTask):
    """Sentences with the questions that they answer; of several that hold it, the one most similar to the question."""

    name = "short_squad"

    @property
    def dataset(self) -> str:
        """The last part of the source, marked as sentences."""
        return f"{super().dataset}, sentences"

    def rows(self, split: str) -> Rows:
        """See `Task.rows`; questions whose answer is not within one sentence are left out."""
        return group(_short(super().rows(split)))


def _short(rows: Rows) -> Iterator[tuple[str, str, list[str]]]:
    for row in rows:
        sentences = SENTENCE_END.split(row["context"])
        for query, answers in zip(row["queries"], row["answers"], strict=True):
            words = set(_WORD.findall(query.lower()))
            holding = [sentence for sentence in sentences if answers[0] in sentence]
            if holding:
                like = [len(words & set(_WORD.findall(sentence.lower()))) for sentence in holding]
                yield holding[like.index(max(like))], query, answers
