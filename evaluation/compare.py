"""Compare two models' answers to the same questions in pairs, which is more precise than comparing their means."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from gradmem_adapter.training.rows import json_lines

_DATA = ["dataset", "split", "states"]
_TEXTS = [*_DATA, "write_steps", "query", "answer", "accepted"]


def load_answers(path: Path) -> pd.DataFrame:
    """The answers in a file of `python -m evaluation run --answers`, one per row.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a file of answers.
    """
    try:
        rows = [row for _, row in json_lines(path)]
    except ValueError as error:
        raise ValueError(f"{path} is not a file of answers: {error}") from error
    for row in rows:
        if missing := [name for name in _TEXTS if name not in row]:
            raise ValueError(f"{path} is not a file of answers: an answer has no {', '.join(missing)}.")
    return pd.DataFrame(rows)


def differences(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """For each score, the mean difference between the first and the second model over the same questions in the same
    order, its standard error, and their ratio (`errors`).

    Raises:
        ValueError: the questions differ.
    """
    asked = [table[["query", "accepted"]].to_numpy().tolist() for table in (first, second)]
    if asked[0] != asked[1]:
        raise ValueError(f"The files have different questions: {len(first)} and {len(second)}. Use the same data.")
    names = first.columns.difference(_TEXTS, sort=False)
    apart = first[names].reset_index(drop=True) - second[names].reset_index(drop=True)
    found = pd.DataFrame({"mean": apart.mean(), "error": apart.sem().fillna(0)})
    return found.assign(errors=(found["mean"] / found["error"]).fillna(0))


def compare(first: Path, second: Path) -> pd.DataFrame:
    """A row for every two groups of answers to the same questions, even at different numbers of write steps, in %.

    Raises:
        ValueError: a file does not hold answers, or the files have nothing in common.
    """
    one, other = (load_answers(path).groupby([*_DATA, "write_steps"]) for path in (first, second))
    rows = []
    for (*data, steps), answers in one:
        for (*same, others), theirs in other:
            if same != data:
                continue
            found = differences(answers, theirs)
            shown = {name: f"{100 * row['mean']:+.1f} ± {100 * row['error']:.1f}" for name, row in found.iterrows()}
            apart = {"f1 / ±": f"{found.loc['f1', 'errors']:+.1f}"} if "f1" in found.index else {}
            where = dict(zip(["", "split", "states"], data, strict=True)) | {"K": f"{steps}, {others}"}
            rows.append(where | {"of": len(answers)} | shown | apart)
    if not rows:
        raise ValueError(f"{first} and {second} have no data set, split and number of states side by side in common.")
    return pd.DataFrame(rows)
