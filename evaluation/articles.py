"""Articles of thousands of words with questions: as files hold them, and cut into pieces."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmem_adapter.segments import Segment, segments
from gradmem_adapter.training.rows import json_lines

if TYPE_CHECKING:
    from evaluation.run import Answerer


def articles(source: str, split: str) -> list[dict[str, Any]]:
    """The articles of a split that have questions, with these.

    Args:
        source (`str`): a directory with `squad_articles_<split>.jsonl.gz`, an article a line: `context`, whose
            paragraphs have empty lines between them, and `questions` with `query`, `answers` and `para`, the number of
            the paragraph that answers.
        split (`str`): of the data.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no question in it.
    """
    path = Path(source) / f"squad_articles_{split}.jsonl.gz"
    found = [row for _, row in json_lines(path) if row["questions"]]
    if not found:
        raise ValueError(f"No article of {path} has a question: give it some that have.")
    return found


def drawn(questions: list[dict[str, Any]], most: int | None, draw: random.Random) -> list[dict[str, Any]]:
    """So many of an article's questions; None, or no more than that: all.

    Args:
        questions (`list[dict]`): of the article.
        most (`int`, *optional*): how many.
        draw (`random.Random`): what draws them.
    """
    return questions if most is None or most >= len(questions) else draw.sample(questions, most)


def paragraphs(text: str) -> list[tuple[int, int]]:
    """Where each paragraph of an article begins and ends."""
    places, start = [], 0
    for paragraph in text.split("\n\n"):
        places.append((start, start + len(paragraph)))
        start += len(paragraph) + 2
    return places


def into_segments(text: str, answerer: Answerer, most: int | None) -> list[Segment]:
    """An article in segments.

    Args:
        text (`str`): the article.
        answerer (`Answerer`): the model that reads them.
        most (`int`, *optional*): tokens of a segment; None: as `pipeline.segments`.

    Raises:
        ValueError: the length of segments is not known.
    """
    config = getattr(answerer.model, "active_peft_config", None)
    if (limit := most or getattr(config, "segment_tokens", None)) is None:
        raise ValueError("Articles need segment_tokens where the model does not say its trained length.")
    return list(segments(text, answerer.tokenizer, limit))
