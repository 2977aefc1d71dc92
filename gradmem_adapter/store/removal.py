"""How states leave a memory store: from disk and index together, or not at all."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from gradmem_adapter.store.files import state_file_of
from gradmem_adapter.store.index import Index
from gradmem_adapter.utils.files import FULL

T = TypeVar("T")

_GOING = ".going"
"""Suffix of a state's file until the index has dropped the state."""
_ROOM = 2**16
"""Bytes that a transaction of the index needs; on a full disk, at least this many are freed first."""


def removing(index: Index, work: Callable[[sqlite3.Connection, Callable[[str], None]], T]) -> T:
    """Remove states in one transaction of the index. If it fails, their files stay.

    One exception: if the disk is full and deleting these files makes enough room for the transaction, they are deleted
    and the transaction is repeated.

    Args:
        index (`Index`): the store's index.
        work (`Callable`): does the removing, given the connection and a function that removes the state of a key.

    Returns:
        What `work` returns.
    """
    going: list[Path] = []

    def done() -> T:
        with index.writing() as connection:

            def remove(key: str) -> None:
                file = state_file_of(index.states, key)
                with suppress(FileNotFoundError):
                    going.append(file.replace(file.with_name(file.name + _GOING)))
                connection.execute("DELETE FROM states WHERE key = ?", (key,))

            return work(connection, remove)

    try:
        result = done()
    except BaseException as error:
        full = isinstance(error, OSError) and error.errno in FULL
        if not full or sum(file.stat().st_size for file in going) < _ROOM:
            for file in going:
                with suppress(FileNotFoundError):  # `settle` may have restored it
                    file.replace(file.with_suffix(""))
            raise
        _unlink(going)
        result = done()
    _unlink(going)
    return result


def left(index: Index) -> list[Path]:
    """Files of states that are being removed, or were when a process was killed."""
    return list(index.states.glob(f"*/*{_GOING}"))


def settle(index: Index, connection: sqlite3.Connection) -> None:
    """Finish removals that killed processes began: restore files of states that the index still has, delete the others.

    Args:
        index (`Index`): the store's index.
        connection (`Connection`): to the index, in a transaction.
    """
    for file in left(index):
        listed = connection.execute("SELECT 1 FROM states WHERE key = ?", (file.name.split(".")[0],)).fetchone()
        whole = file.with_suffix("")
        if listed and not whole.exists():
            file.replace(whole)
        else:
            file.unlink(missing_ok=True)


def _unlink(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
