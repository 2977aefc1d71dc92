"""Plain text as training data: passages of it to be written, and what comes after some of their words to be asked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradmem_adapter.utils.files import read_text

from .qa import qa_rows

SHORTEST, LONGEST = 16, 256
"""Words of a passage."""
CUE, CONTINUATION = 6, 8
"""Words that a question quotes, and words of its answer."""
QUESTIONS = 4
"""On a passage."""


def text_rows(source: str | Path, split: str, **hub_options: Any) -> list[dict[str, Any]]:
    """Passages with questions about what comes next in them, as `GradMemCollator` takes them.

    Args:
        source: a directory with `<split>.txt` or `<split>.txt.gz`, a text a line, or what `qa_rows` takes, whose
            contexts are the texts then.
        split: "train", "valid" or "test".
        hub_options: for `datasets.load_dataset`.

    Returns:
        {"context", "queries", "targets"} each; the same texts give the same rows.

    Raises:
        ValueError: no text has SHORTEST words.
        OSError, ValueError: a file cannot be read; as `qa_rows` raises them.
    """
    texts = _texts(Path(source), split, hub_options)
    rows = [_row(words) for text in texts for words in _passages(text.split())]
    if not rows:
        raise ValueError(f"None of the {len(texts)} texts of {str(source)!r} has {SHORTEST} words.")
    return rows


def _texts(directory: Path, split: str, hub_options: dict[str, Any]) -> list[str]:
    for suffix in (".txt", ".txt.gz"):
        if (file := directory / f"{split}{suffix}").is_file():
            return [line for line in read_text(file).split("\n") if line.strip()]
    return [row["context"] for row in qa_rows(directory, split, **hub_options)]


def _passages(words: list[str]) -> Iterator[list[str]]:
    """A text's words cut to passages of various lengths: short ones are learned first."""
    draw = random.Random(" ".join(words[:LONGEST]))
    while len(words) >= SHORTEST:
        count = draw.randint(SHORTEST, LONGEST)
        if len(words) - count < SHORTEST:
            count = min(len(words), LONGEST)
        yield words[:count]
        words = words[count:]


def _row(words: list[str]) -> dict[str, Any]:
    draw = random.Random(" ".join(words))
    places = range(len(words) - CUE)
    starts = sorted(draw.sample(places, min(QUESTIONS, len(places))))
    return {
        "context": " ".join(words),
        "queries": [f'What comes after "{" ".join(words[i : i + CUE])}"?' for i in starts],
        "targets": [" ".join(words[i + CUE : i + CUE + CONTINUATION]) for i in starts],
    }
