"""Plain text for training: passages to write, and questions about what comes after some of their words."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import field
from typing import Annotated, Any

import pydantic

from evaluation.data import Rows, contexts, text_lines
from gradmem_adapter.utils.wording import counted

from .base import OPTIONS, Task

SHORTEST = 16
"""The fewest words in a passage."""
CUE, CONTINUATION = 6, 8
"""How many words a question quotes, and how many words its answer has."""
QUESTIONS = 4
"""Questions on each passage."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class PlainText(Task):
    """Passages with questions about what comes next in them; the same texts give the same rows.

    Args:
        source (`str`): a directory with `<split>.txt` or `<split>.txt.gz`, one text per line, or a source for
            `qa_rows`, whose contexts are used as texts, with or without questions.
        longest (`int`, *optional*, defaults to `256`): the most words in a passage.
        continued (`int`, *optional*, defaults to `0`): also ask for this many words that come after a passage. Memory
            does not hold them, but helps to guess them as the passage itself would.
        hub (`dict`, *optional*): other arguments of `datasets.load_dataset`.
    """

    source: str
    longest: Annotated[int, pydantic.Field(ge=2 * SHORTEST)] = 256
    continued: pydantic.NonNegativeInt = 0
    hub: dict[str, Any] = field(default_factory=dict)

    name = "plain_text"
    measured = False

    @property
    def dataset(self) -> str:
        """The last part of the source, marked as text."""
        return f"{self.source.rstrip('/').rpartition('/')[2]}, text"

    def rows(self, split: str) -> Rows:
        """See `Task.rows`.

        Raises:
            ValueError: no text has at least `SHORTEST` words.
        """
        texts = self._texts(split)
        rows = []
        for text in texts:
            passages = list(_passages(text.split(), self.longest))
            following = [*(" ".join(words[: self.continued]) for words in passages[1:]), ""]
            rows += [_row(words, after) for words, after in zip(passages, following, strict=False)]
        if not rows:
            raise ValueError(f"{self.source!r} has {counted(len(texts), 'text')}, but none with {SHORTEST} words.")
        return rows

    def _texts(self, split: str) -> list[str]:
        lines = text_lines(self.source, split)
        return contexts(self.source, split, **self.hub) if lines is None else lines


def _passages(words: list[str], longest: int) -> Iterator[list[str]]:
    """A text's words, cut into passages of various lengths: short ones are learned first."""
    draw = random.Random(" ".join(words[:longest]))
    while len(words) >= SHORTEST:
        count = draw.randint(SHORTEST, longest)
        if len(words) - count < SHORTEST:
            count = min(len(words), longest)
        yield words[:count]
        words = words[count:]


def _row(words: list[str], after: str) -> dict[str, Any]:
    draw = random.Random(" ".join(words))
    places = range(len(words) - CUE)
    starts = sorted(draw.sample(places, min(QUESTIONS, len(places))))
    asked = [(i, " ".join(words[i + CUE : i + CUE + CONTINUATION])) for i in starts]
    asked += [(len(words) - CUE, after)] * bool(after)
    return {
        "context": " ".join(words),
        "queries": [f'What comes after "{" ".join(words[i : i + CUE])}"?' for i, _ in asked],
        "targets": [target for _, target in asked],
    }
