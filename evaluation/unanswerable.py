"""Questions that a context does not answer, and the right answer to them."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gradmem_adapter.prompts import Prompt

from .data import SENTENCE_END, Rows

REFUSAL = "not in memory"
"""The right answer if the context does not answer the question."""
NEAR = 8
"""How many rows before and after a row count as near: they are usually of the same article."""


def with_unanswerable(rows: Rows, share: float, near: float = 0.0) -> list[dict[str, Any]]:
    """Rows with a share of questions from other rows, whose right answer is `REFUSAL`.

    Args:
        rows: rows with queries, targets and answers; at least two, unless the share is 0.
        share: the share of such questions, from 0 to less than 1. The same rows give the same questions.
        near: the share of these, from 0 to 1, that comes from at most `NEAR` rows before or after, which are usually
            about the same subject, unless the context may answer them all. The others come from any row.
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


def without_answers(rows: Rows, share: float) -> list[dict[str, Any]]:
    """Rows of which a share lacks a sentence that answers a question. The right answer is then `REFUSAL`.

    Such questions are on the subject of the context. Those that the rest may still answer are left out.

    Args:
        rows: rows with queries, targets and answers.
        share: the share of these rows, from 0 to 1. The same rows give the same sentences.
    """
    draw = random.Random(len(rows))
    return [_without_an_answer(row, draw) if draw.random() < share else dict(row) for row in rows]


def _without_an_answer(row: Mapping[str, Any], draw: random.Random) -> dict[str, Any]:
    holding = [
        sentence
        for sentence in SENTENCE_END.split(row["context"])
        if any(answer in sentence for accepted in row["answers"] for answer in accepted)
    ]
    gone = draw.choice(holding) if holding else ""
    made: dict[str, Any] = {
        "context": row["context"].replace(gone, "").strip(),
        "queries": [],
        "targets": [],
        "answers": [],
    }
    for query, target, accepted in zip(row["queries"], row["targets"], row["answers"], strict=True):
        if not any(answer in gone for answer in accepted):
            asked = (query, target, accepted)
        elif not any(occurs(answer, made["context"]) for answer in accepted):
            asked = (query, REFUSAL, [REFUSAL])
        else:
            continue
        for name, value in zip(("queries", "targets", "answers"), asked, strict=True):
            made[name].append(value)
    return made if made["context"] and made["queries"] else dict(row)


def _from_near(rows: Rows, number: int, draw: random.Random) -> Iterator[Prompt]:
    """Questions of nearby rows in random order, without those that the context of this row may answer."""
    around = [*rows[max(0, number - NEAR) : number], *rows[number + 1 : number + 1 + NEAR]]
    asked = [pair for row in around for pair in zip(row["queries"], row["answers"], strict=True)]
    for query, answers in draw.sample(asked, len(asked)):
        if query not in rows[number]["queries"] and not any(occurs(text, rows[number]["context"]) for text in answers):
            yield query


def occurs(answer: str, context: str) -> bool:
    """Whether all words of an answer are words of a context, ignoring case, punctuation and articles, as scores do."""
    # Scores take "1867-1871" for one word, but it may answer a question for 1867.
    return any(_words(answer, mark) <= _words(context, mark) for mark in ("", " "))


def _words(text: str, mark: str) -> set[str]:
    return set(re.sub(r"[^\w\s]|_", mark, text.casefold()).split()) - {"a", "an", "the"}
