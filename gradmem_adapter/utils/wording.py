"""Words of messages."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number with what it counts: "1 memory state", "2 queries", "1,024 tokens".

    Args:
        number (`int`): how many.
        noun (`str`): the name of one of them, whose plural is regular.
    """
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        noun = f"{noun[:-1]}ie"
    elif noun.endswith(("s", "x", "ch", "sh")):
        noun += "e"
    return f"{number:,} {noun}s"
