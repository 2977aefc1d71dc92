"""Articles of thousands of words with questions: read from files, and cut into pieces."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradmem_adapter.segments import Segment, segments
from gradmem_adapter.training.rows import json_lines

if TYPE_CHECKING:
    from evaluation.run import Answerer


def articles(source: str, split: str) -> list[dict[str, Any]]:
    """The articles of a split that have questions, with their questions.

    Args:
        source (`str`): a directory with `squad_articles_<split>.jsonl.gz`, one article per line: `context`, whose
            paragraphs are separated by empty lines, and `questions` with `query`, `answers` and `para`, the number of
            the paragraph that answers.
        split (`str`): the split of the data.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no article in it has a question.
    """
    path = Path(source) / f"squad_articles_{split}.jsonl.gz"
    found = [row for _, row in json_lines(path) if row["questions"]]
    if not found:
        raise ValueError(f"No article of {path} has a question: add articles with questions.")
    return found


def drawn(questions: list[dict[str, Any]], most: int | None, draw: random.Random) -> list[dict[str, Any]]:
    """A random sample of an article's questions.

    Args:
        questions (`list[dict]`): the article's questions.
        most (`int`, *optional*): the most questions to draw; None: all.
        draw (`random.Random`): the random generator.
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
    """Cut an article into segments.

    Args:
        text (`str`): the article.
        answerer (`Answerer`): the model that reads them.
        most (`int`, *optional*): the most tokens in a segment; None: as for `pipeline.segments`.

    Raises:
        ValueError: the length of segments is not known.
    """
    config = getattr(answerer.model, "active_peft_config", None)
    if (limit := most or getattr(config, "segment_tokens", None)) is None:
        raise ValueError("The model does not say its trained length: set segment_tokens for tasks on articles.")
    return list(segments(text, answerer.tokenizer, limit))
