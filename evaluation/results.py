"""Measurements as JSON lines: one kind of record for all of them, from which all tables and plots are made."""

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
        method (`str`): the method that was measured.
        dataset (`str`, *optional*): the data, by its name in tables.
        split (`str`, *optional*): the split of the data.
        memory_tokens (`int`, *optional*): m; 0 if there is no memory of fixed size.
        trained_steps (`str`, *optional*): the write steps (or passes) that training drew from, such as "5" or "1-12".
        write_steps (`int`, *optional*): K in the measurement.
        states (`int`, *optional*): how many contexts a question was asked of.
        settings (`dict`, *optional*): other settings that distinguish measurements, such as the number of pairs.
        metrics (`dict`): means, by name.
        errors (`dict`, *optional*): standard errors of the means.
        n (`int`, *optional*): the number of items averaged.
        device (`str`, *optional*): where it was measured: the model of the GPU, or "CPU".
        training_steps, training_minutes (`float`, *optional*): how long the model was trained.
        seed (`int`, *optional*): the seed of the measurement.
        facts (`dict`, *optional*): other information: commit, date, command, versions, sizes.
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
        """Identifies the measurement: a later record with the same key replaces this one."""
        return json.dumps([getattr(self, name) for name in KEY], sort_keys=True)


KEY = (
    "task", "dataset", "split", "method", "memory_tokens", "trained_steps", "states", "settings", "write_steps",
)  # fmt: skip


def load_records(*paths: Path) -> list[Record]:
    """The records of files; none if a file does not exist.

    Raises:
        ValueError: a line is not a record; the message names it.
    """
    found = []
    for path in paths:
        for number, line in enumerate(read_text(path).split("\n") if path.exists() else (), 1):
            if not line:
                continue
            try:
                found.append(Record(**from_json(line, "it")))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is not a record of a measurement: {error}") from error
    return found


def add_records(path: Path, new: Iterable[Record]) -> None:
    """Add records to a file, replacing older ones with the same key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):  # several evaluations may write at the same time
        merged = {record.key: record for record in (*load_records(path), *new)}
        with replacing(path) as temporary:
            temporary.write_text("".join(_line(merged[key]) + "\n" for key in merged), encoding="utf-8")


def _line(record: Record) -> str:
    """A record as JSON, without unknown values."""
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
    """The name of a device in records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
