"""Building blocks of tables: rows of result files, cells, and Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import pandas as pd

from evaluation.methods import METHODS
from evaluation.results import RESULTS, frame, load_records
from gradmem_adapter.utils.wording import counted

Frame: TypeAlias = pd.DataFrame


def markdown(table: Frame) -> str:
    """A table as Markdown; what is missing is left empty."""
    rows = [["" if value is None or value != value else str(value) for value in row] for row in table.to_numpy()]
    heads = [str(column) for column in table.columns]
    lines = [heads, *rows]
    lines.insert(1, ["---"] * len(heads))
    return "".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|\n" for line in lines)


def percent(value: float, error: float = math.nan) -> str:
    """A share in %, with its standard error if it has one."""
    return f"{100 * value:.1f}" + ("" if math.isnan(error) else f" ± {100 * error:.1f}")


def time_and_memory(rows: Frame) -> str:
    """Time and memory, such as "127 ms, 5.8 GiB"; for repeated measurements, "121, 120 ms, 4.8 GiB"."""
    times = ", ".join(dict.fromkeys(f"{math.floor(value + 0.5):,}" for value in rows["milliseconds"].dropna()))
    memory = rows["peak_gib"].dropna()
    return "" if not times else f"{times} ms" + (f", {memory.max():.1f} GiB" if len(memory) else "")


def read(name: str, **where: Any) -> Frame:
    """The rows of a result file whose columns have the given values; `limit` selects those on part of the data."""
    table = frame(load_records(RESULTS / f"{name}.jsonl"))
    if "limit" in table and "limit" not in where:
        table = table[table["limit"].isna()]
    for column, value in where.items():
        table = table[table[column] == value]
    return table


def general_passages() -> Frame:
    """The general adapters' results on passages, each in its own state, without questions to refuse."""
    table = frame(load_records(RESULTS / "general.jsonl"))
    through_steps = (table["method"] != "gradmem") | (table["trained_steps"] != "0")
    return table[(table["task"] == "passages") & (table["states"] == 1) & table["unanswerable"].isna() & through_steps]


def in_order(table: Frame, names: Iterable[str], column: str = "method") -> Frame:
    """Rows whose column has one of the names, in the order of the names."""
    order = list(names)
    return table[table[column].isin(order)].sort_values(column, key=lambda c: c.map(order.index), kind="stable")


def grid(
    table: Frame, rows: Sequence[str], columns: Sequence[str], cell: str | Callable[[Frame], str], corner: str = ""
) -> Frame:
    """A row for each label and a column for each heading, in order of first appearance.

    Args:
        rows, columns: the label and the heading of each row of `table`.
        cell: the content of a cell, given the rows of `table` for it; a string is formatted with the last of them.
    """

    def text(found: Frame) -> str:
        return cell.format(**found.iloc[-1]) if isinstance(cell, str) else cell(found)

    groups = table.assign(_row=list(rows), _column=list(columns)).groupby(["_row", "_column"])
    cells = {place: text(found) for place, found in groups}
    heads = list(dict.fromkeys(columns))
    lines = [[label, *(cells.get((label, head)) for head in heads)] for label in dict.fromkeys(rows)]
    return Frame(lines, columns=[corner, *heads])


def data_title(dataset: str) -> str:
    """The name of a data set in tables and plots."""
    return dataset.replace("babi", "bAbI").replace("fairytaleqa", "FairytaleQA").replace("squad", "SQuAD")


def line_title(method: str, steps: int | None) -> str:
    """A method and its write steps, such as "GradMem, 2 steps"."""
    kind = METHODS[method]
    if kind.step is None or steps is None:
        return kind.title
    return f"{kind.title}, {counted(steps, kind.step)}"
