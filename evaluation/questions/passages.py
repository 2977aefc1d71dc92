"""Cut passages from texts that have no questions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from evaluation.data import contexts, text_lines
from gradmem_adapter.segments import segments

SHORTEST = 40
"""The fewest words of a passage that is cut from a text."""
PROSE = 0.93
"""The least share of letters and marks between words in a line of prose; tables and formulas have less."""
_MARKS, _OPENING = " ,.;:'\"!?()“”‘’-–—", "\"'“‘("  # noqa: RUF001 # marks as books have them


def passages(
    source: str, split: str, tokenizer: PreTrainedTokenizerBase, longest: int, draw: random.Random
) -> Iterator[str]:
    """Passages of a source: its contexts, or pieces of various lengths from a text with one paragraph per line.

    A text is cut at the ends of paragraphs, or else of sentences. A passage never crosses a line that is not prose,
    such as a heading. The sections between such lines are taken in random order.

    Args:
        source: a directory with `<split>.txt` or `<split>.txt.gz`; or what `records` takes, with or without questions.
        split: the split of the source.
        tokenizer: a fast tokenizer.
        longest: the most tokens in a passage. Longer contexts are left out.
        draw: the random generator for lengths and order.
    """
    lines = text_lines(source, split)
    if lines is None:
        yield from (text for text in contexts(source, split) if len(tokenizer(text)["input_ids"]) <= longest)
        return
    places = ["\n\n".join(place) for prose, place in groupby(lines, is_prose) if prose]
    draw.shuffle(places)
    for place in places:
        for segment in segments(place, tokenizer, draw.randint(longest // 3, longest)):
            words = segment.text.split()
            if len(words) >= SHORTEST:
                yield " ".join(words)


def is_prose(line: str) -> bool:
    """Whether a line is running text."""
    line = line.strip()
    plain = sum(character.isalpha() or character in _MARKS for character in line)
    return plain >= PROSE * len(line) and (line[0].isalnum() or line[0] in _OPENING)
