"""Segments: pieces of a long text that are written separately. Texts are cut only here."""

from __future__ import annotations

import itertools
import operator
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, cast

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gradmem_adapter.utils.tokens import check_text
from gradmem_adapter.utils.wording import counted

_PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")
_SENTENCE_END = re.compile(r"""[.!?…]["'”’)\]]*\s+|[。！？]["'”’」』)）]*\s*|\n\s*""")  # noqa: RUF001 # marks of other scripts
_WORD_END = re.compile(r"\s+")
_CHARACTERS = 8
"""The characters to tokenise first per token of a segment: few texts have this many per token."""
_PIECE = 2**14
"""The most characters of the text to process at once."""


@dataclass(frozen=True)
class Segment:
    """A piece of a long text.

    Args:
        text (`str`): the piece, without surrounding white space: `whole[start:end]`.
        start (`int`): the index of its first character in the whole text.
        end (`int`): the index after its last character.
        tokens (`int`): the number of tokens that WRITE reads, special ones included.
    """

    text: str
    start: int
    end: int
    tokens: int


def segments(
    text: str | Iterable[str] | Iterable[int], tokenizer: PreTrainedTokenizerBase, limit: int, overlap: int = 0
) -> Iterator[Segment]:
    """Cut a text of any length at the ends of paragraphs, else of sentences, else of words, else of characters.

    A segment ends at the last such place in the second half of what fits. Segments near the end of the text have about
    the same length. No more text is held than the next segment needs, and segments do not depend on the pieces that the
    text comes in.

    Args:
        text (`str`, `Iterable[str]` or `Iterable[int]`): the text; or its consecutive pieces, such as the lines of an
            open file; or its token ids.
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer, which knows the positions of its tokens in a text.
        limit (`int`): the most tokens in a segment, special ones included.
        overlap (`int`, *optional*, defaults to `0`): the most tokens at the end of a segment that the next one repeats:
            whole sentences, or else words. Less than a quarter of `limit`. Nothing is repeated where a paragraph ended.

    Yields:
        `Segment`: in order; none if the text is all white space.

    Raises:
        TypeError: the text is not one, or the tokenizer is slow.
        ValueError: the text is not valid Unicode, or a number cannot work.
    """
    own = len(tokenizer("")["input_ids"])
    _check_numbers(limit, overlap, own)
    if not tokenizer.is_fast:
        raise TypeError(
            f"Cutting a text needs a fast tokenizer, got {type(tokenizer).__name__}. Load it with "
            "AutoTokenizer.from_pretrained(..., use_fast=True)."
        )
    return _segments(_Ahead(_pieces(text, cast(PreTrainedTokenizerFast, tokenizer))), tokenizer, limit, overlap, own)


def unknown_length(remedy: str) -> str:
    """The error message for an unknown segment length."""
    return (
        "The adapter does not say its trained length, so the number of tokens that one memory state can hold is "
        f"unknown: {remedy}"
    )


def _check_numbers(limit: int, overlap: int, own: int) -> None:
    if type(limit) is not int or limit <= own:
        raise ValueError(f"A segment needs at least {counted(own + 1, 'token')}, {own} of them special, got {limit!r}.")
    if type(overlap) is not int or not 0 <= 4 * overlap < max(limit, 1):
        raise ValueError(
            f"overlap must be a non-negative integer below a quarter of a segment of {counted(limit, 'token')}, got "
            f"{overlap!r}."
        )


def _segments(
    ahead: _Ahead, tokenizer: PreTrainedTokenizerBase, limit: int, overlap: int, own: int
) -> Iterator[Segment]:
    end = 0
    """The end of the last segment."""
    while True:
        window, ends, places = _look(ahead, tokenizer, limit)
        if not window:
            return
        room = limit - own
        if ends:  # divide the rest into equal parts
            room = -(-len(places) // -(-len(places) // room)) if places else room
        while True:
            cut = _cut(window, places, room)
            text = window[:cut].rstrip()
            whole = len(text) == len(window)
            tokens = len(places) + own if whole else len(tokenizer(text, verbose=False)["input_ids"])
            if tokens <= limit and text:
                break
            room -= max(1, tokens - limit)  # the tokens at a cut may differ from those in the whole text
            if room < 1:
                raise ValueError(
                    f"The character {window[0]!r} alone has more than {counted(limit, 'token')}, the most for a "
                    "segment. Allow longer segments."
                )
        if (new := ahead.start + len(text) > end) and tokens > own:
            end = ahead.start + len(text)
            yield Segment(text, ahead.start, end, tokens)
        last = cut == len(window) and ends
        ahead.drop(_next_start(window, places, text, cut, overlap) if new and not last else cut)


def _look(ahead: _Ahead, tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[str, bool, list[int]]:
    """The next characters, more than two segments if there are enough; whether they are the last; and the start of each
    of their tokens. The number of characters depends only on the text, not on its pieces."""
    size = _CHARACTERS * limit
    while True:
        window = ahead.read(size)
        if white := len(window) - len(window.lstrip()):
            ahead.drop(white)
            continue
        if not window:
            return "", True, []
        ends = len(window) < size
        encoded = tokenizer(window, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = [start for start, _ in encoded["offset_mapping"]]
        if ends or len(places) > 2 * limit:
            return window, ends, places
        size *= 2


def _cut(window: str, places: list[int], room: int) -> int:
    """Where to cut a text so that the part before has at most about `room` tokens."""
    if len(places) <= room:
        return len(window)
    end = places[room]
    while end < len(window) and window[end].isspace():
        end += 1
    middle = places[room // 2]
    for rule in (_PARAGRAPH_END, _SENTENCE_END, _WORD_END):
        if found := [match.end() for match in rule.finditer(window, middle, end)]:
            return found[-1]
    return end


def _next_start(window: str, places: list[int], text: str, cut: int, overlap: int) -> int:
    """The start of the next segment, which repeats the end of this one unless a paragraph ended there."""
    tokens = bisect_left(places, len(text))
    if overlap and tokens > overlap and not _PARAGRAPH_END.search(window, len(text), cut):
        floor = places[tokens - overlap]
        for rule in (_SENTENCE_END, _WORD_END):
            if (match := rule.search(window, max(floor - 1, 1), len(text))) and match.end() < len(text):
                return match.end()
    return cut


class _Ahead:
    """A text that is read only as far as needed."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.pieces = pieces
        self.start = 0
        """The position in the whole text of the next character."""
        self._text = ""

    def read(self, length: int) -> str:
        """The next characters, fewer at the end of the text."""
        parts, known = [self._text], len(self._text)
        while known < length and (piece := next(self.pieces, None)) is not None:
            parts.append(piece)
            known += len(piece)
        self._text = "".join(parts)
        return self._text[:length]

    def drop(self, length: int) -> None:
        """Skip this many characters."""
        self._text = self._text[length:]
        self.start += length


def _pieces(text: str | Iterable[str] | Iterable[int], tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Convert a text to short pieces."""
    if not isinstance(text, str | Iterable) or isinstance(text, bytes | bytearray | memoryview | Mapping | Set):
        raise TypeError(f"Expected a text, its pieces or its token ids, got {type(text).__name__}.")
    rest = iter([text] if isinstance(text, str) else text)
    first = next(rest, "")
    whole = itertools.chain([first], rest)
    return _short(cast(Iterator[str], whole)) if isinstance(first, str) else _decoded(whole, tokenizer)


def _short(pieces: Iterator[str]) -> Iterator[str]:
    for number, piece in enumerate(pieces):
        if not isinstance(piece, str):
            raise TypeError(f"Piece {number} of the text is a {type(piece).__name__}, but earlier pieces are texts.")
        check_text(f"Piece {number} of the text" if number else "The text", piece)
        yield from (piece[i : i + _PIECE] for i in range(0, len(piece), _PIECE))


def _decoded(ids: Iterator[Any], tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    stream, known = DecodeStream(skip_special_tokens=True), range(len(tokenizer))
    waiting: list[int] = []
    for number, token in enumerate(ids):
        try:
            index = operator.index(token)
        except TypeError:
            index = -1
        if index not in known:
            raise TypeError(f"Element {number} of the text is {token!r}, which is not a token id of the tokenizer.")
        waiting.append(index)
        if piece := stream.step(tokenizer.backend_tokenizer, index):
            yield piece
            waiting.clear()
    yield str(tokenizer.decode(waiting, skip_special_tokens=True))  # an incomplete character at the end, or �
