"""Questions that a context does not answer, and what is right to answer them."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from typing import Any

from gradmem_adapter.prompts import Prompt

from .data import Rows

REFUSAL = "not in memory"
"""What is right where the context does not answer the question."""
NEAR = 8
"""Rows before and behind one that are near it: of one article, as a rule."""


def with_unanswerable(rows: Rows, share: float, near: float = 0.0) -> list[dict[str, Any]]:
    """Rows of which a share of the questions are those of other rows, which `REFUSAL` answers.

    Args:
        rows: two at least, with queries, targets and answers.
        share: from 0 to less than 1. The same rows give the same questions.
        near: so large a share of these, from 0 to 1, comes from at most `NEAR` rows before or behind, which tell of the
            same as a rule, unless the context may answer them all; the others come from anywhere.
    """
    draw, close, made = random.Random(len(rows)), random.Random(len(rows) + 1), []
    for number, row in enumerate(rows):
        wanted = len(row["queries"]) * share / (1 - share)
        count = int(wanted) + (draw.random() < wanted % 1)
        from_near = sum(close.random() < near for _ in range(count))
        asked = list(itertools.islice(_from_near(rows, number, close), from_near))
        others = [rows[(number + draw.randrange(1, len(rows))) % len(rows)] for _ in range(count - len(asked))]
        asked += [draw.choice(other["queries"]) for other in others]
        made.append(
            {
                "context": row["context"],
                "queries": [*row["queries"], *asked],
                "targets": [*row["targets"], *(REFUSAL for _ in asked)],
                "answers": [*row["answers"], *([REFUSAL] for _ in asked)],
            }
        )
    return made


def _from_near(rows: Rows, number: int, draw: random.Random) -> Iterator[Prompt]:
    """Questions of the rows around one, in any order, without those that its context may answer."""
    around = [*rows[max(0, number - NEAR) : number], *rows[number + 1 : number + 1 + NEAR]]
    asked = [pair for row in around for pair in zip(row["queries"], row["answers"], strict=True)]
    for query, answers in draw.sample(asked, len(asked)):
        if query not in rows[number]["queries"] and not any(occurs(text, rows[number]["context"]) for text in answers):
            yield query


def occurs(answer: str, context: str) -> bool:
    """Whether all words of an answer are words of a context, without case, punctuation and articles as in scores."""
    # "1867-1871" is one word to a score; but it may answer a question for 1867
    return any(_words(answer, mark) <= _words(context, mark) for mark in ("", " "))


def _words(text: str, mark: str) -> set[str]:
    return set(re.sub(r"[^\w\s]|_", mark, text.casefold()).split()) - {"a", "an", "the"}
