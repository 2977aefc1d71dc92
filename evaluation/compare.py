"""Two models' answers to the same questions, compared in pairs: surer than what their standard errors say apart."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from gradmem_adapter.training.rows import json_lines

_DATA = ["dataset", "split", "states"]
_TEXTS = [*_DATA, "write_steps", "query", "answer", "accepted"]


def load_answers(path: Path) -> pd.DataFrame:
    """Answers that `python -m evaluation run --answers` kept, a row each.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    try:
        rows = [row for _, row in json_lines(path)]
    except ValueError as error:
        raise ValueError(f"{path} is no file of answers: {error}") from error
    for row in rows:
        if missing := [name for name in _TEXTS if name not in row]:
            raise ValueError(f"{path} is no file of answers: an answer has no {', '.join(missing)}.")
    return pd.DataFrame(rows)


def differences(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Of each score, over questions that both answered, in the same order: the mean of the first model's less the
    second's, its standard error, and how many of these (`errors`) it is from 0.

    Raises:
        ValueError: they are not the same questions.
    """
    asked = [table[["query", "accepted"]].to_numpy().tolist() for table in (first, second)]
    if asked[0] != asked[1]:
        raise ValueError(f"These are not the same questions: {len(first)} of one, {len(second)} of the other.")
    names = first.columns.difference(_TEXTS, sort=False)
    apart = first[names].reset_index(drop=True) - second[names].reset_index(drop=True)
    found = pd.DataFrame({"mean": apart.mean(), "error": apart.sem().fillna(0)})
    return found.assign(errors=(found["mean"] / found["error"]).fillna(0))


def compare(first: Path, second: Path) -> pd.DataFrame:
    """A row for every two groups of answers to the same questions, whatever the numbers of write steps, in %.

    Raises:
        ValueError: a file holds something else, or nothing that the other has.
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
