"""Files of rows: JSON lines, each with a context and queries on it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from gradmem_adapter.utils.fields import from_json
from gradmem_adapter.utils.files import read_text

from .collator import read_row


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read rows as `GradMemCollator` takes them from a file of JSON lines, gzipped or not.

    Args:
        path (`str` or `Path`): the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a row, or there is none; the message names the line.
    """
    named = json_lines(Path(path))
    for name, row in named:
        read_row(name, row)
    return [row for _, row in named]


def json_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects in a file of JSON lines, each with its file and line for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object, or there is none; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of rows {str(path)!r}.")
    found = []
    for number, line in enumerate(io.StringIO(read_text(path), newline="\n"), 1):
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        try:
            row = from_json(line, name)
        except ValueError as error:
            raise ValueError(f"{error}. A file of rows must have one complete JSON object on each line.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{name} must be an object with a context, got {type(row).__name__}.")
        found.append((name, row))
    if not found:
        raise ValueError(f"{path} has no rows. Write at least one JSON object into it.")
    return found
