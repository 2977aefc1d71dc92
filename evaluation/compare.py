"""Two models' answers to the same questions, compared in pairs: surer than what their standard errors say apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from gradmem_adapter.training.rows import json_lines

from .scores import standard_error

Answers = list[dict[str, Any]]
_ABOUT = ("dataset", "split", "states", "write_steps")
_TEXTS = (*_ABOUT, "query", "answer", "accepted")


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


def load_answers(path: Path) -> dict[tuple[Any, ...], Answers]:
    """Answers that `python -m evaluation run --answers` kept, by data set, split, number of contexts and write steps.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    groups: dict[tuple[Any, ...], Answers] = {}
    try:
        for _, row in json_lines(path):
            missing = [name for name in _TEXTS if name not in row]
            if missing:
                raise KeyError(missing[0])
            groups.setdefault(tuple(row[name] for name in _ABOUT), []).append(row)
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
    for name in (name for name in first[0] if name not in _TEXTS):
        apart = torch.tensor([a[name] - b[name] for a, b in zip(first, second, strict=True)], dtype=torch.float64)
        result[name] = Difference(apart.mean().item(), standard_error(apart))
    return result


def compare(first: Path, second: Path) -> pd.DataFrame:
    """A row for every two groups of answers to the same questions, whatever the numbers of write steps, in %.

    Raises:
        ValueError: a file holds something else, or nothing that the other has.
    """
    one, other = load_answers(first), load_answers(second)
    rows = []
    for (dataset, split, states, steps), answers in one.items():
        for key in sorted(key for key in other if key[:3] == (dataset, split, states)):
            found = differences(answers, other[key])
            shown = {name: f"{100 * score.mean:+.1f} ± {100 * score.error:.1f}" for name, score in found.items()}
            apart = {f"{name} / ±": f"{score.errors:+.1f}" for name, score in found.items() if name == "f1"}
            where = {"": dataset, "split": split, "contexts": states, "K": f"{steps}, {key[3]}", "of": len(answers)}
            rows.append(where | shown | apart)
    if not rows:
        raise ValueError(f"{first} and {second} have no data set, split and number of contexts in common.")
    return pd.DataFrame(rows)
