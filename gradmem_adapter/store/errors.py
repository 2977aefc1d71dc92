"""What can be wrong with a memory store, and SQLite's errors in the words of the rest of the package."""

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
"""What SQLite says where the system keeps it from reading or writing."""

ANEW = (
    "The states are not in it: `gradmem store rebuild {}`, or MemoryStore.rebuild() in Python, makes it anew from "
    "their files."
)


class MemoryStoreError(ValueError):
    """An index that cannot be read: damaged, lost, or of another version."""


class UnknownStateError(KeyError):
    """A key that a memory store does not hold."""

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def sqlite_errors(index: Path) -> Iterator[None]:
    """Errors of SQLite inside the block become an `OSError` if the system is at fault, else a `MemoryStoreError`.

    Args:
        index (`Path`): the file, for messages.
    """
    try:
        yield
    except sqlite3.ProgrammingError as error:
        if "is not supported" in str(error):
            raise TypeError(f"A source and a key of a memory store are texts: {error}.") from error
        raise  # our fault
    except sqlite3.DatabaseError as error:
        for said, number in _OF_THE_SYSTEM.items():
            if said in str(error):
                raise OSError(number, f"{os.strerror(number)} (SQLite: {error})", str(index)) from error
        raise MemoryStoreError(f"The index {str(index)!r} is damaged ({error}). {ANEW.format(index.parent)}") from error
