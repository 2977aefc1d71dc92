"""Two models' answers to the same questions, compared in pairs: surer than what their standard errors say apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .qa_results import SCORES, standard_error
from .rows import json_lines

Answers = list[dict[str, Any]]


@dataclass(frozen=True)
class Difference:
    """Of a score over the same questions: the mean of the first model's less the second's, and its standard error."""

    mean: float
    error: float

    @property
    def errors(self) -> float:
        """How many standard errors it is from 0; infinite where all differences are the same."""
        if self.error:
            return self.mean / self.error
        return math.copysign(math.inf, self.mean) if self.mean else 0.0


def load_answers(path: Path) -> dict[tuple[str, str, int, int], Answers]:
    """Answers that `gradmem eval --answers` kept, by data set, split, number of contexts asked of and write steps.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    groups: dict[tuple[str, str, int, int], Answers] = {}
    try:
        for _, row in json_lines(path):
            key = row["dataset"], row["split"], row["states"], row["write_steps"]
            groups.setdefault(key, []).append({name: row[name] for name in ("query", "accepted", *SCORES)})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of answers: {type(error).__name__} {error}.") from error
    return groups


def differences(first: Answers, second: Answers) -> dict[str, Difference]:
    """Of each score, over questions that both answered, in the same order.

    Raises:
        ValueError: they are not the same questions.
    """
    asked = [[(row["query"], row["accepted"]) for row in rows] for rows in (first, second)]
    if asked[0] != asked[1]:
        raise ValueError(f"These are not the same questions: {len(first)} of one, {len(second)} of the other.")
    result = {}
    for name in SCORES:
        apart = torch.tensor([a[name] - b[name] for a, b in zip(first, second, strict=True)], dtype=torch.float64)
        result[name] = Difference(apart.mean().item(), standard_error(apart))
    return result


def compare(first: Path, second: Path) -> Table:
    """A row for every two groups of answers to the same questions, whatever the numbers of write steps.

    Raises:
        ValueError: a file holds something else, or nothing that the other has.
    """
    one, other = load_answers(first), load_answers(second)
    table = Table(title=f"{first.name} less {second.name}, in pairs")
    table.add_column("", no_wrap=True)
    for heading in ("K", "of", "match", "F1", "ROUGE-L", "F1 / ±"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (dataset, split, states, steps), answers in one.items():
        part = ("" if split == "test" else f", {split}") + ("" if states == 1 else f" of {states}")
        for others in sorted(key[3] for key in other if key[:3] == (dataset, split, states)):
            found = differences(answers, other[dataset, split, states, others])
            shown = [f"{100 * found[name].mean:+.1f} ± {100 * found[name].error:.1f}" for name in SCORES]
            ratio = f"{found['f1'].errors:+.1f}"
            table.add_row(dataset + part, f"{steps}, {others}", str(len(answers)), *shown, ratio)
    if not table.rows:
        raise ValueError(f"{first} and {second} have no data set, split and number of contexts in common.")
    return table
