"""The bAbI tasks (Weston et al., 2015): short stories of simple facts, and questions with answers of one word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradmem_adapter.utils.files import read_text

from .qa import has_tables, load_from_hub, parse
from .rows import json_lines


def babi_rows(source: str | Path, number: int, split: str, **hub_options: Any) -> list[dict[str, Any]]:
    """The questions of one task, each on all facts told before it.

    Args:
        source: a directory with `qa<number>_<split>.jsonl` (or `.jsonl.gz`), or with the original release's
            `qa<number>_<name>_<split>.txt`; otherwise a dataset on the hub with a column `task`.
        number: of the task, 1 to 20.
        split: "train", "valid" or "test", or as the dataset calls it.
        hub_options: for `datasets.load_dataset`: name, revision, ...

    Returns:
        {"context", "query", "target"} each.

    Raises:
        FileNotFoundError: the directory has no such task or split; the message lists its files.
        ValueError: the hub's dataset has no such task, or no column `task`.
    """
    directory = Path(source)
    if not directory.is_dir() or has_tables(directory):
        records = list(load_from_hub(str(source), split, **hub_options))
        if records and "task" not in records[0]:
            raise ValueError(f"{str(source)!r} has no column task; it has {', '.join(records[0])}.")
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
    """A file of the original release: numbered lines, a story begins at 1, a question has tabs.

    Raises:
        ValueError: a line has another form; the message names it.
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
    return rows


def _row(context: str, query: str, answers: list[str]) -> dict[str, Any]:
    if not answers:
        raise ValueError(f"The question {query!r} has no answer.")
    return {"context": context, "query": query, "target": answers[0]}
