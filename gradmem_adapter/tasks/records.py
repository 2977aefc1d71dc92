"""Measurements in one JSON file per task, from which every table and plot is made."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from filelock import FileLock

from gradmem_adapter.utils.files import replacing


class Record(Protocol):
    """One measurement, a dataclass."""

    @property
    def key(self) -> Hashable:
        """What a later measurement replaces; sortable."""


RecordT = TypeVar("RecordT", bound=Record)


def task_of(path: Path) -> str:
    """The task that a file of results is about.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["task"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of results: {type(error).__name__} {error}.") from error


def load_records(path: Path, task: str, kind: type[RecordT]) -> list[RecordT]:
    """The records of a file; none where there is no file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return []
    if (found := task_of(path)) != task:
        raise ValueError(f"{path} has results on {found}, not on {task}.")
    try:
        return [kind(**record) for record in json.loads(path.read_text(encoding="utf-8"))["records"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of results on {task}: {error}") from error


def add_records(path: Path, task: str, kind: type[RecordT], new: Iterable[RecordT]) -> None:
    """Add records to a file, in the place of older ones with the same key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):  # two evaluations may end at the same time
        merged: dict[Any, Any] = {record.key: record for record in (*load_records(path, task, kind), *new)}
        content = {"task": task, "records": [asdict(merged[key]) for key in sorted(merged)]}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def device_name(device: torch.device) -> str:
    """As records name what they were measured on: a GPU by its model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def pyplot() -> Any:
    """Matplotlib's, for files alone.

    Raises:
        ImportError: it is not installed; the message says how.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'gradmem-adapter[plot]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
