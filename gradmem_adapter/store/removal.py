"""How states leave a memory store: files and index together, or neither."""

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
"""Behind the name of a file while the index forgets its state."""
_ROOM = 2**16
"""Bytes that a transaction of the index takes; so many are freed before it where the disk is full."""


def removing(index: Index, work: Callable[[sqlite3.Connection, Callable[[str], None]], T]) -> T:
    """A transaction of the index that removes states. Where it fails their files stay, unless they are large enough to
    make the room that it needs on a full disk: then it begins anew without them.

    Args:
        index (`Index`): of the store.
        work (`Callable`): does it, given the connection and what removes the state of a key.

    Returns:
        What `work` does.
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
                with suppress(FileNotFoundError):  # `settle` came before
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
    """End what killed processes began: files of states that the index still has come back, and others go.

    Args:
        index (`Index`): of the store.
        connection (`Connection`): to it, in a transaction.
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
