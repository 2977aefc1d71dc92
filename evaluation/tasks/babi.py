"""The bAbI tasks (Weston et al., 2015): short stories of simple facts, and questions with one-word answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import pydantic

from evaluation.data import Rows, group, has_tables, load_from_hub, parse
from gradmem_adapter.training.rows import json_lines
from gradmem_adapter.utils.files import read_text

from .base import OPTIONS, Task


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Babi(Task):
    """One bAbI task, each question on all facts told before it.

    Args:
        source (`str`): a directory or a dataset on the hub, see `babi_rows`.
        number (`int`): the number of the task, 1 to 20.
        every_question (`bool`, *optional*, defaults to `False`): in training, ask every question that a story of tasks
            1, 2 or 5 answers (`with_every_question`), not only its own.
        hub (`dict`, *optional*): other arguments of `datasets.load_dataset`.
    """

    source: str
    number: pydantic.PositiveInt
    every_question: bool = False
    hub: dict[str, Any] = field(default_factory=dict)

    name = "babi"

    def __post_init__(self) -> None:
        if self.every_question and self.number not in EVERY_QUESTION:
            raise ValueError(f"every_question supports only the bAbI tasks {EVERY_QUESTION}, got {self.number}.")

    @property
    def dataset(self) -> str:
        """The name and the number, such as "babi 2"."""
        return f"babi {self.number}"

    def rows(self, split: str) -> Rows:
        """See `Task.rows`."""
        return babi_rows(self.source, self.number, split, **self.hub)

    def training_rows(self) -> Rows:
        """See `Task.training_rows`."""
        rows = self.rows("train")
        if self.every_question:
            return with_every_question(rows, self.number)
        return group((row["context"], row["query"], [row["target"]]) for row in rows)


def babi_rows(source: str | Path, number: int, split: str, **hub_options: Any) -> list[dict[str, Any]]:
    """The questions of one task, each on all facts told before it.

    Args:
        source: a directory with `qa<number>_<split>.jsonl` (or `.jsonl.gz`), or with the original release's
            `qa<number>_<name>_<split>.txt`; otherwise a dataset on the hub with a column `task`.
        number: the number of the task, 1 to 20.
        split: "train", "valid" or "test", or the dataset's own name of a split.
        hub_options: for `datasets.load_dataset`: name, revision, ...

    Returns:
        A list of {"context", "query", "target"}.

    Raises:
        FileNotFoundError: the directory has no such task or split; the message lists its files.
        ValueError: the hub's dataset has no such task, or no column `task`.
    """
    directory = Path(source)
    if not directory.is_dir() or has_tables(directory):
        records = list(load_from_hub(str(source), split, **hub_options))
        if records and "task" not in records[0]:
            raise ValueError(f"{str(source)!r} has no column 'task'; its columns are {', '.join(records[0])}.")
        found = [record for record in records if int(record["task"]) == number]
        if not found:
            raise ValueError(f"{str(source)!r} has no task {number} in its split {split!r}.")
        return [_row(*parse(record)) for record in found]
    for suffix in (".jsonl", ".jsonl.gz"):
        if (file := directory / f"qa{number}_{split}{suffix}").is_file():
            return [_row(*parse(record)) for _, record in json_lines(file)]
    for file in sorted(directory.glob(f"qa{number}_*_{split}.txt")):
        return read_babi(file)
    there = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
    raise FileNotFoundError(f"{directory} has no qa{number}_{split}.jsonl and no original file. It has {there}.")


def read_babi(path: Path) -> list[dict[str, Any]]:
    """A file of the original release: numbered lines; a story begins at 1, and a question has tabs.

    Raises:
        ValueError: a line has another form, and the message shows it; or there is no question.
    """
    rows: list[dict[str, Any]] = []
    facts: list[str] = []
    for place, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        number, _, text = line.partition(" ")
        if not number.isdigit() or not text:
            raise ValueError(f"{path}, line {place}: expected a number and a sentence, got {line!r}.")
        if int(number) == 1:
            facts = []
        query, *answer = text.split("\t")
        if answer:
            rows.append(_row(" ".join(facts), query.strip(), [answer[0].strip()]))
        else:
            facts.append(text.strip())
    if not rows:
        raise ValueError(f"{path} has no question: the line of a question has tabs before and after its answer.")
    return rows


def _row(context: str, query: str, answers: list[str]) -> dict[str, Any]:
    if not answers:
        raise ValueError(f"The question {query!r} has no answer.")
    return {"context": context, "query": query, "target": answers[0]}


# ---------------------------------------------------------------- every question that a story answers

_MOVE = re.compile(r"(\w+) (?:moved|went|journeyed|travelled|went back) to the (\w+)$")
_TAKE = re.compile(r"(\w+) (?:took|got|grabbed|picked up) the (\w+)(?: there)?$")
_DROP = re.compile(r"(\w+) (?:dropped|put down|let go of|discarded|left) the (\w+)(?: there)?$")
_GIVE = re.compile(r"(\w+) (?:gave|handed|passed) (?:(\w+) the (\w+)|the (\w+) to (\w+))$")

Answers = dict[str, str]
"""Questions with their right answers."""


def with_every_question(rows: Iterable[Mapping[str, Any]], number: int) -> list[dict[str, Any]]:
    """Turn rows with one question into rows with every question that their facts answer, each context once.

    Args:
        rows: {"context", "query", "target"}, as `babi_rows` returns them.
        number: the number of the task: 1 (where people are), 2 (where things are), 5 (who gave what to whom). Not 4:
            its world is so small that nearly every context of the test set occurs in training, and so would all its
            questions.

    Returns:
        A list of {"context", "queries", "targets"}, with the row's own question first.

    Raises:
        ValueError: the task is not supported; or the answer of a row contradicts its facts.
    """
    if number not in _ASK:
        raise ValueError(f"every_question supports only the bAbI tasks {EVERY_QUESTION}, got {number}.")
    asked: dict[str, Answers] = {}
    for row in rows:
        context, query, target = row["context"], row["query"], row["target"]
        if context not in asked:
            asked[context] = {query: target}
        found = _ASK[number](_sentences(context))
        if found.get(query) != target:
            raise ValueError(
                f"By the facts of a row of bAbI task {number}, the answer to {query!r} is "
                f"{found.get(query, 'nothing')!r}, not {target!r}: leave out every_question. The facts: {context}"
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
    """A thing is where its holder is, or where its holder put it down."""
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
    """Questions about the last gifts: what was given, by whom, and to whom."""
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
