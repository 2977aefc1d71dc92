"""Files that are whole or not there, and texts."""

from __future__ import annotations

import gzip
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place when the block ends; an error leaves `path` as it was.

    Args:
        path (`Path`): the file to make or to replace.

    Raises:
        FileNotFoundError: the directory does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no directory {str(path.parent)!r} to save {path.name!r} in; make it first.")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """A text in UTF-8, gzipped (`.gz`) or not.

    Args:
        path (`Path`): the file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, or not in UTF-8; the message names it.
    """
    try:
        return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged, or not gzipped: {error}.") from error


def check_writable(path: Path) -> None:
    """Find out before the work, not after it, that a file cannot be written.

    Args:
        path (`Path`): the file that will be written; it is left as it is.

    Raises:
        OSError: it cannot; the message says why.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory; name a file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no directory {str(path.parent)!r} to save {path.name!r} in; make it first.")
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
    except OSError as error:
        raise OSError(f"{str(path)!r} cannot be written: {error.strerror}.") from error
    probe.unlink()
