"""The index of a memory store: one SQLite file, which can be rebuilt from the states' files at any time."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from gradmem_adapter.store.entry import Entry, Place
from gradmem_adapter.store.errors import ANEW, MemoryStoreError, sqlite_errors
from gradmem_adapter.utils.files import errors_named
from gradmem_adapter.utils.temporary import locked, temporary_directory

T = TypeVar("T")

VERSION = 2
"""`PRAGMA user_version` of the schema."""
_SCHEMA = f"""
    CREATE TABLE states(
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, text TEXT, tokens INTEGER NOT NULL, fingerprint TEXT NOT NULL,
        options TEXT NOT NULL, nbytes INTEGER NOT NULL, written REAL NOT NULL
    );
    -- A text found in several sources is one state with several places.
    CREATE TABLE places(
        key TEXT NOT NULL REFERENCES states(key) ON DELETE CASCADE, source TEXT, start INTEGER, "end" INTEGER,
        metadata TEXT NOT NULL
    );
    CREATE INDEX places_of_a_state ON places(key);
    CREATE INDEX places_of_a_source ON places(source, start);
    CREATE TABLE embeddings(
        id INTEGER PRIMARY KEY REFERENCES states(id) ON DELETE CASCADE, model TEXT NOT NULL, vector BLOB NOT NULL
    );
    CREATE VIRTUAL TABLE texts USING fts5(text, content='states', content_rowid='id', tokenize='porter unicode61');
    CREATE TRIGGER texts_in AFTER INSERT ON states BEGIN
        INSERT INTO texts(rowid, text) VALUES (new.id, new.text);
    END;
    CREATE TRIGGER texts_out AFTER DELETE ON states BEGIN
        INSERT INTO texts(texts, rowid, text) VALUES ('delete', old.id, old.text);
    END;
    CREATE TRIGGER texts_changed AFTER UPDATE OF text ON states BEGIN
        INSERT INTO texts(texts, rowid, text) VALUES ('delete', old.id, old.text);
        INSERT INTO texts(rowid, text) VALUES (new.id, new.text);
    END;
    -- Counts writes. It starts at a random number, so that two indexes are unlikely to have the same count.
    CREATE TABLE changes(count INTEGER NOT NULL);
    INSERT INTO changes VALUES (random() / 2);
    PRAGMA user_version = {VERSION};
"""
_ENTRIES = """
    SELECT key, source, start, "end", text, metadata, options, tokens, fingerprint, nbytes, written
    FROM states JOIN places USING (key)
"""


class _Way(NamedTuple):
    """How SQLite opens an index."""

    mode: str
    locking: str


_SHARED = _Way("mode=rw", "NORMAL")
_ALONE = _Way("mode=rw", "EXCLUSIVE")
"""For a full disk: avoids the shared-memory file, which cannot grow there (https://sqlite.org/wal.html#noshm)."""
_UNCHANGING = _Way("immutable=1", "NORMAL")
"""For processes that may only read. SQLite then does not check for writers: the lock on the folder keeps them out."""
_UNCHANGING_LOG = _Way("mode=ro&vfs=unix-none", "EXCLUSIVE")
"""The same if the write-ahead log has changes: a writer was killed, or closed while others were reading."""
_KEPT_BACK = (errno.EACCES, errno.EROFS, errno.EIO)
"""Error numbers that `sqlite_errors` raises if SQLite could not create a file."""


class Index:
    """Connections to the index of a store, a new one for each operation: threads and processes share no connection.

    Args:
        folder (`Path`): the store's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "index.sqlite"
        self.states = folder / "states"
        self.vectors: Any = None
        """The embeddings that `embedding.cosines` read last."""

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection for reading. A store that does not exist yet reads as an empty one.

        Raises:
            MemoryStoreError: the index is damaged, lost, or of a newer version.
            OSError: it cannot be opened.
        """
        if not self.exists():
            with closing(sqlite3.connect(":memory:")) as connection:
                connection.executescript(_SCHEMA)
                yield connection
            return
        with self._open([_SHARED, _ALONE, _UNCHANGING]) as connection:
            yield connection

    @contextmanager
    def _open(self, ways: Sequence[_Way]) -> Iterator[sqlite3.Connection]:
        """A connection in the first of these ways that the system permits."""
        with ExitStack() as stack:
            for way in ways:
                try:
                    connection = stack.enter_context(self._opened(way))
                    break
                except OSError as error:
                    if error.errno not in _KEPT_BACK or way is ways[-1]:
                        raise
            yield connection

    @contextmanager
    def _opened(self, way: _Way) -> Iterator[sqlite3.Connection]:
        with locked(self.folder, shared=way is _SHARED), sqlite_errors(self.path):
            log = Path(f"{self.path}-wal")
            if way is _UNCHANGING and log.exists() and log.stat().st_size:
                way = _UNCHANGING_LOG
                if os.name != "posix":
                    said = "has changes in its log, which this system can only read with write access; copy the store"
                    raise OSError(errno.EROFS, said, str(self.path))
            with closing(self._connect(way)) as connection:
                yield connection

    def exists(self) -> bool:
        """Whether the store exists.

        Raises:
            MemoryStoreError: the index is lost.
        """
        states = self.states.exists()  # checked first, as it is created after the index
        if self.path.exists():
            return True
        if states:
            raise MemoryStoreError(f"The index {str(self.path)!r} is missing. {ANEW.format(self.folder)}")
        return False

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction during which no other process or thread writes to the index or to the states' files.

        An error rolls back the changes to the index.

        Raises:
            MemoryStoreError: the index is damaged, lost, or of a newer version.
            OSError: it cannot be written.
        """
        self.make()
        with self._open([_SHARED, _ALONE]) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection  # after an error it is closed without COMMIT, which rolls back
            connection.execute("UPDATE changes SET count = count + 1")
            connection.execute("COMMIT")

    def make(self) -> None:
        """Create the folder and an empty index, if they do not exist.

        Raises:
            MemoryStoreError: the index is lost.
            OSError: they cannot be created.
        """
        with errors_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if not self.exists():
            with self.replacing(missing=True):
                pass

    def _connect(self, way: _Way) -> sqlite3.Connection:
        name = f"{self.path.absolute().as_uri()}?{way.mode}"
        connection = sqlite3.connect(name, uri=True, timeout=60, isolation_level=None)
        try:
            connection.execute(f"PRAGMA locking_mode = {way.locking}")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise MemoryStoreError(
                    f"The index {str(self.path)!r} has version {version}, but this gradmem_adapter reads only versions "
                    f"up to {VERSION}. Upgrade gradmem-adapter."
                )
            connection.execute("SELECT 1 FROM states")  # the first statement that reads the file
            if version < VERSION:
                raise MemoryStoreError(
                    f"The index {str(self.path)!r} has version {version}, from an older gradmem_adapter. "
                    f"{ANEW.format(self.folder)}"
                )
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA secure_delete = ON")  # overwrite deleted content
            connection.execute("PRAGMA synchronous = NORMAL")  # `add` enters again what a crash of the machine loses
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def replacing(self, *, missing: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction in a new index, which replaces the old one when the block ends.

        Nobody reads or writes the old one in the meantime.

        Args:
            missing (`bool`, *optional*, defaults to `False`): keep an index that exists by then.

        Raises:
            OSError: the new index cannot be written.
        """
        with locked(self.folder), temporary_directory(self.folder) as temporary, sqlite_errors(self.path):
            new = temporary / self.path.name
            with closing(sqlite3.connect(new, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(_SCHEMA)
                connection.execute("BEGIN")
                yield connection
                connection.execute("COMMIT")
            if not (missing and self.path.exists()):
                for log in ("-wal", "-shm"):
                    Path(f"{self.path}{log}").unlink(missing_ok=True)
                os.replace(new, self.path)


def insert(connection: sqlite3.Connection, entries: Sequence[Entry]) -> None:
    """Insert a state with all its places, replacing what the index has of it.

    Args:
        connection (`Connection`): in a transaction.
        entries (`Sequence[Entry]`): one for each place, otherwise equal.
    """
    one = entries[0]
    connection.execute(
        """
        INSERT INTO states(key, text, tokens, fingerprint, options, nbytes, written) VALUES (?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT(key) DO UPDATE SET text = excluded.text, tokens = excluded.tokens, options = excluded.options,
            fingerprint = excluded.fingerprint, nbytes = excluded.nbytes, written = excluded.written
        """,
        (one.key, one.text, one.tokens, one.fingerprint, json.dumps(one.options), one.nbytes, one.written),
    )
    connection.execute("DELETE FROM places WHERE key = ?", (one.key,))
    connection.executemany(
        "INSERT INTO places VALUES (?, ?, ?, ?, ?)",
        [(entry.key, *entry.place, json.dumps(entry.metadata)) for entry in entries],
    )


def places_of(connection: sqlite3.Connection, source: str | None) -> list[tuple[str, Place]]:
    """Keys and places in the order of sources and places."""
    where, values = ("TRUE", ()) if source is None else ("source = ?", (source,))
    rows = connection.execute(
        f"""
        SELECT key, source, start, "end" FROM states JOIN places USING (key) WHERE {where}
        ORDER BY source, start, states.id
        """,
        values,
    )
    return [(key, (source, start, end)) for key, source, start, end in rows]


def kinds_of(
    connection: sqlite3.Connection, source: str, kind_of: Callable[[Entry], T]
) -> Iterator[tuple[str, Place, T]]:
    """Keys, places and kinds of a source's entries, without reading their texts.

    Args:
        connection (`Connection`): to the index.
        source (`str`): the source.
        kind_of (`Callable`): returns the kind of an entry that has only source, fingerprint, options and metadata. It
            is called once for all entries with the same values of these.
    """

    @cache
    def kind(fingerprint: str, options: str, metadata: str) -> T:
        return kind_of(_entry("", source, None, None, None, metadata, options, 0, fingerprint))

    rows = connection.execute(
        """
        SELECT key, start, "end", fingerprint, options, metadata FROM places JOIN states USING (key) WHERE source = ?
        """,
        (source,),
    )
    return ((key, (source, start, end), kind(*common)) for key, start, end, *common in rows)


def entries_of(connection: sqlite3.Connection, keys: Collection[str]) -> Iterator[Entry]:
    """All entries of some states.

    Args:
        connection (`Connection`): to the index.
        keys (`Collection[str]`): keys of the states; those not in the index are ignored.
    """
    return select(connection, "key IN (SELECT value FROM json_each(?))", (json.dumps(list(keys)),))


def select(connection: sqlite3.Connection, where: str = "TRUE", values: Sequence[object] = ()) -> Iterator[Entry]:
    """Entries in the order of their sources and places."""
    for row in connection.execute(f"{_ENTRIES} WHERE {where} ORDER BY source, start, states.id", values):
        yield _entry(*row)


def _entry(
    key: str, source: Any, start: Any, end: Any, text: str | None, metadata: str, options: str, *rest: Any
) -> Entry:
    """The entry of a row; `DatabaseError` if the row holds none that a store could have written."""
    try:
        return Entry(key, source, start, end, text, json.loads(metadata), json.loads(options), *rest)
    except (TypeError, ValueError) as error:
        raise sqlite3.DatabaseError(f"its row for {key} is invalid: {error}") from error
