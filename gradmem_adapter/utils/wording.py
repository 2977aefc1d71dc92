"""Wording of messages."""

from __future__ import annotations


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
