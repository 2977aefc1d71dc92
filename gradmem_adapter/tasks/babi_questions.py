"""Every question that a bAbI story answers, found by living through it: several questions on a context in training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_MOVE = re.compile(r"(\w+) (?:moved|went|journeyed|travelled|went back) to the (\w+)$")
_TAKE = re.compile(r"(\w+) (?:took|got|grabbed|picked up) the (\w+)(?: there)?$")
_DROP = re.compile(r"(\w+) (?:dropped|put down|let go of|discarded|left) the (\w+)(?: there)?$")
_GIVE = re.compile(r"(\w+) (?:gave|handed|passed) (?:(\w+) the (\w+)|the (\w+) to (\w+))$")

Answers = dict[str, str]
"""What is asked, and what is right."""


def with_every_question(rows: Iterable[Mapping[str, Any]], number: int) -> list[dict[str, Any]]:
    """Rows of one question as rows of every question that their facts answer, each context once.

    Args:
        rows: {"context", "query", "target"} each, as `babi_rows` returns them.
        number: of the task: 1 (where people are), 2 (where things are), 5 (who gave what to whom). Not 4: its world is
            so small that nearly every context of the test set occurs in training; all its questions would too.

    Returns:
        {"context", "queries", "targets"} each, the row's own question first.

    Raises:
        ValueError: another task; or a row whose own answer is not what its facts say.
    """
    if number not in _ASK:
        raise ValueError(f"every_question is for the bAbI tasks {EVERY_QUESTION}, not for {number}.")
    asked: dict[str, Answers] = {}
    for row in rows:
        context, query, target = row["context"], row["query"], row["target"]
        if context not in asked:
            asked[context] = {query: target}
        found = _ASK[number](_sentences(context))
        if found.get(query) != target:
            raise ValueError(
                f"The facts of a row of bAbI task {number} say {found.get(query, 'nothing')!r} to {query!r}, and its "
                f"answer is {target!r}: leave every_question out for such data. The facts: {context}"
            )
        asked[context] |= found
    return [
        {"context": context, "queries": list(answers), "targets": list(answers.values())}
        for context, answers in asked.items()
    ]


def _sentences(context: str) -> list[str]:
    return [sentence.strip() for sentence in context.split(".") if sentence.strip()]


def _places_of_people(facts: list[str]) -> Answers:
    return {f"Where is {move[1]}?": move[2] for fact in facts if (move := _MOVE.match(fact))}


def _places_of_things(facts: list[str]) -> Answers:
    """A thing is where its holder is, or where that was when it was put down."""
    person: dict[str, str] = {}
    holder: dict[str, str] = {}
    left: dict[str, str | None] = {}
    for fact in facts:
        if move := _MOVE.match(fact):
            person[move[1]] = move[2]
        elif take := _TAKE.match(fact):
            holder[take[2]] = take[1]
        elif drop := _DROP.match(fact):
            left[drop[2]] = person.get(holder.pop(drop[2], drop[1]))
    places = left | {thing: person.get(who) for thing, who in holder.items()}
    return {f"Where is the {thing}?": place for thing, place in places.items() if place is not None}


def _gifts(facts: list[str]) -> Answers:
    """The last gift of each kind."""
    found: Answers = {}
    for fact in facts:
        if gift := _GIVE.match(fact):
            giver, receiver, thing = gift[1], gift[2] or gift[5], gift[3] or gift[4]
            found[f"What did {giver} give to {receiver} last?"] = thing
            found[f"Who did {giver} give the {thing} to last?"] = receiver
            found[f"Who received the {thing} last?"] = receiver
    return found


_ASK: dict[int, Callable[[list[str]], Answers]] = {
    1: _places_of_people,
    2: _places_of_things,
    5: _gifts,
}
EVERY_QUESTION = tuple(_ASK)
