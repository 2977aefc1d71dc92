"""Measurements as JSON lines: one record for everything, from which every table and plot is made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock

from gradmem_adapter.utils.fields import from_json
from gradmem_adapter.utils.files import read_text, replacing

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Record:
    """One measurement.

    Args:
        task (`str`): what was measured: a task, or a benchmark.
        method (`str`): of what.
        dataset (`str`, *optional*): the data, as tables name them.
        split (`str`, *optional*): of the data.
        memory_tokens (`int`, *optional*): m; 0 where there is no memory of fixed size.
        trained_steps (`str`, *optional*): the write steps (or passes) that training drew from, as "5" or "1-12".
        write_steps (`int`, *optional*): K that was measured.
        states (`int`, *optional*): how many contexts a question was asked of.
        settings (`dict`, *optional*): whatever else makes it another measurement, as the number of pairs.
        metrics (`dict`): means, by name.
        errors (`dict`, *optional*): their standard errors.
        n (`int`, *optional*): how many items the means are of.
        device (`str`, *optional*): where it was measured: a GPU by its model.
        training_steps, training_minutes (`float`, *optional*): of the model.
        seed (`int`, *optional*): of what was drawn to measure.
        facts (`dict`, *optional*): what is good to know besides: commit, date, command, versions, sizes.
    """

    task: str
    method: str
    dataset: str = ""
    split: str = ""
    memory_tokens: int | None = None
    trained_steps: str = ""
    write_steps: int | None = None
    states: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    n: int | None = None
    device: str = ""
    training_steps: int | None = None
    training_minutes: float | None = None
    seed: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What a later measurement replaces."""
        return json.dumps([getattr(self, name) for name in KEY], sort_keys=True)


KEY = (
    "task", "dataset", "split", "method", "memory_tokens", "trained_steps", "states", "settings", "write_steps",
)  # fmt: skip


def load_records(*paths: Path) -> list[Record]:
    """The records of files; none where there is no file.

    Raises:
        ValueError: a file holds something else; the message names the line.
    """
    found = []
    for path in paths:
        for number, line in enumerate(read_text(path).split("\n") if path.exists() else (), 1):
            if not line:
                continue
            try:
                found.append(Record(**from_json(line, "it")))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no record of a measurement: {error}") from error
    return found


def add_records(path: Path, new: Iterable[Record]) -> None:
    """Add records to a file, in the place of older ones with the same key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):  # two evaluations may end at the same time
        merged = {record.key: record for record in (*load_records(path), *new)}
        with replacing(path) as temporary:
            temporary.write_text("".join(_line(merged[key]) + "\n" for key in merged), encoding="utf-8")


def _line(record: Record) -> str:
    """What is not known is left out."""
    known = {name: value for name, value in asdict(record).items() if value not in (None, "", {})}
    return json.dumps(known, ensure_ascii=False, allow_nan=False)


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """A row for each record; settings, metrics and facts are columns, standard errors `<metric>_error`."""
    rows = []
    for record in records:
        row = {name.name: getattr(record, name.name) for name in fields(record)}
        errors = {f"{name}_error": value for name, value in row.pop("errors").items()}
        rows.append(row | row.pop("facts") | row.pop("settings") | row.pop("metrics") | errors)
    return pd.DataFrame(rows)


def device_name(device: torch.device) -> str:
    """As records name what they were measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
