"""Wording of messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar


def counted(number: int, noun: str) -> str:
    """A number with its noun in the right form: "1 memory state", "2 queries", "1,024 tokens".

    Args:
        number (`int`): how many.
        noun (`str`): the singular of a noun with a regular plural.
    """
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        noun = f"{noun[:-1]}ie"
    elif noun.endswith(("s", "x", "ch", "sh")):
        noun += "e"
    return f"{number:,} {noun}s"


_numbers: ContextVar[Sequence[int]] = ContextVar("gradmem_numbers", default=())


@contextmanager
def numbered(numbers: Sequence[int]) -> Iterator[None]:
    """Within the block, errors and warnings call context i what they call context `numbers[i]` outside of it.

    Args:
        numbers (`Sequence[int]`): the places of a batch's contexts in what the caller passed.
    """
    token = _numbers.set([number_of(i) for i in numbers])
    try:
        yield
    finally:
        _numbers.reset(token)


def number_of(index: int) -> int:
    """What messages call a context: its place in what the caller passed, and not in the batch.

    Args:
        index (`int`): its place in the batch.
    """
    numbers = _numbers.get()
    return numbers[index] if index < len(numbers) else index
