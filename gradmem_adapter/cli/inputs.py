"""The input texts of a command: files, directories, patterns, JSON lines and standard input, in order."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradmem_adapter.cli.errors import described
from gradmem_adapter.cli.reading import STDIN, has_json_lines, is_text, lines, whole
from gradmem_adapter.utils.fields import from_json
from gradmem_adapter.utils.files import decoded, readable


@dataclass(frozen=True)
class Document:
    """A text and its source: a file, or a line of JSON lines, named by its number or by a field of its own."""

    source: str
    text: str


def is_one_text(path: str) -> bool:
    """Whether a path leads to exactly one text: it is not a directory, a pattern or JSON lines."""
    return path == STDIN or not (os.path.isdir(path) or _is_pattern(path) or has_json_lines(path))


@dataclass
class Inputs:
    """The documents at some paths, read one at a time. Inputs that cannot be read are listed in `refused`, and reading
    continues.

    Directories are read recursively, without hidden files. Files found in a directory or by a pattern are skipped if
    they are empty or not text; a file that is named itself is refused.

    Args:
        paths (`Sequence[str]`): files, directories, patterns such as `notes/**/*.md`, or `-` for standard input.
        text_field (`str`, *optional*, defaults to `"text"`): the field of JSON lines that holds the text.
        source_field (`str`, *optional*): the field that holds its name; None: the file and the line number.
        json_lines (`bool`, *optional*, defaults to `False`): standard input holds JSON lines.
        without (`Path`, *optional*): a directory to leave out.
        refused (`list[str]`): so far, which inputs could not be read and why, one per line.
        passed_over (`list[str]`): so far, the files that were skipped because they are empty or not text.
    """

    paths: Sequence[str]
    text_field: str = "text"
    source_field: str | None = None
    json_lines: bool = False
    without: Path | None = None
    refused: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Document]:
        """The documents in the order of the paths; within a directory, in the order of their names."""
        for path in self.paths:
            if path != STDIN and os.path.isdir(path):
                yield from self._found(self._walk(path))
            elif _is_pattern(path):
                yield from self._found(self._matching(path))
            else:
                yield from self._read(path)

    def read_all(self) -> list[Document]:
        """All documents; `ValueError` if one of them cannot be read."""
        documents = list(self)
        if self.refused:
            raise ValueError(self.refused[0])
        return documents

    def refuse(self, error: Exception, place: str | None = None) -> None:
        """Note that a text cannot be used, and why.

        Args:
            error (`Exception`): what was raised. Only its message is kept: the exception would keep the text alive.
            place (`str`, *optional*): where the text comes from; None: the message says it.
        """
        self.refused.append(described(error) if place is None else f"{place}: {described(error)}")

    def _walk(self, directory: str) -> Iterator[str]:
        own, empty = None if self.without is None else os.path.realpath(self.without), True
        for folder, folders, files in os.walk(directory, onerror=self.refuse):
            shown = (name for name in sorted(folders) if not name.startswith("."))
            folders[:] = [name for name in shown if os.path.realpath(os.path.join(folder, name)) != own]
            for name in sorted(files):
                if not name.startswith("."):
                    empty = False
                    yield os.path.join(folder, name)
        if empty:
            self.refused.append(f"There is no text in {directory}: it has no files.")

    def _matching(self, pattern: str) -> Iterator[str]:
        matches = sorted(glob.iglob(pattern, recursive=True))
        if not matches:
            self.refused.append(f"No file matches {pattern!r}.")
        yield from matches

    def _found(self, paths: Iterable[str]) -> Iterator[Document]:
        for path in filter(os.path.isfile, paths):
            try:
                text = is_text(path)
            except OSError as error:
                self.refuse(error)
                continue
            if text:
                yield from self._read(path)
            else:
                self.passed_over.append(path)

    def _read(self, path: str) -> Iterator[Document]:
        name = "stdin" if path == STDIN else path
        try:
            if self.json_lines if path == STDIN else has_json_lines(path):
                for number, line in enumerate(lines(path), 1):
                    yield from self._row(name, number, line)
            else:
                yield _document(name, whole(path))
        except (OSError, ValueError) as error:
            self.refuse(error)

    def _row(self, name: str, number: int, line: bytes) -> Iterator[Document]:
        place = f"{name}, line {number}"
        try:
            if line.strip():
                row = from_json(decoded(place, line), place)
                source = f"{name}:{number}" if self.source_field is None else _text(row, self.source_field, place)
                yield _document(source, _text(row, self.text_field, place))
        except ValueError as error:
            self.refuse(error)


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) and not os.path.lexists(path)


def _text(row: Any, name: str, place: str) -> str:
    """A field of an object of JSON lines; `ValueError` unless it is a text."""
    if isinstance(row, dict) and isinstance(row.get(name), str):
        return row[name]
    there = f"has the fields {', '.join(row)}" if isinstance(row, dict) else f"is a {type(row).__name__}"
    raise ValueError(
        f"{place} must be an object with a text in the field {name!r}, but it {there}. Choose other fields with "
        "--text-field and --source-field."
    )


def _document(source: str, text: str) -> Document:
    from gradmem_adapter.utils.tokens import check_text

    if not text.strip():
        raise ValueError(f"{source} is empty: pass a file with text.")
    source = readable(source)
    check_text("The name of a text", source)
    check_text(source, text)
    return Document(source, text)
