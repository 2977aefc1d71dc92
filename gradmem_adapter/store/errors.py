"""The errors of a memory store, and how SQLite's errors become errors of this package."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OF_THE_SYSTEM = {
    "is full": errno.ENOSPC,
    "readonly": errno.EROFS,
    "unable to open": errno.EACCES,
    "I/O error": errno.EIO,
    "is locked": errno.ETIMEDOUT,
}
"""Parts of SQLite's messages for errors of the operating system, with their numbers."""

ANEW = (
    "The states have their own files: `gradmem store rebuild {}`, or MemoryStore.rebuild() in Python, rebuilds the "
    "index from them."
)


class MemoryStoreError(ValueError):
    """An index that cannot be read: damaged, lost, or of another version."""


class UnknownStateError(KeyError):
    """A key that a memory store does not hold."""

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def sqlite_errors(index: Path) -> Iterator[None]:
    """Turn SQLite's errors inside the block into an `OSError` if the system caused them, else a `MemoryStoreError`."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        if "is not supported" in str(error):
            raise TypeError(f"Sources and keys of a memory store must be strings: {error}.") from error
        raise  # a bug in this package
    except sqlite3.DatabaseError as error:
        for said, number in _OF_THE_SYSTEM.items():
            if said in str(error):
                raise OSError(number, f"{os.strerror(number)} (SQLite: {error})", str(index)) from error
        raise MemoryStoreError(f"The index {str(index)!r} is damaged ({error}). {ANEW.format(index.parent)}") from error
