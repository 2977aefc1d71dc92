"""Check and repair a memory store."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gradmem_adapter.store.entry import Entry
from gradmem_adapter.store.files import read_file, read_memory, state_file_of, write_file
from gradmem_adapter.store.index import Index, insert, select
from gradmem_adapter.store.removal import left, removing, settle
from gradmem_adapter.utils.kinds import check_kind
from gradmem_adapter.utils.state_file import MemoryStateError
from gradmem_adapter.utils.temporary import PREFIX, sweep, temporary_directory

_NAME = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{30})\.safetensors")


@dataclass(frozen=True)
class Report:
    """What `MemoryStore.verify` and `rebuild` found.

    Args:
        states (`int`): the number of states that are whole and as the index says.
        damaged (`Mapping[str, str]`): by key, what is wrong with a state that cannot be read.
        unlisted (`tuple[str, ...]`): keys of whole states that the index lacks or describes differently.
        leftovers (`tuple[str, ...]`): files and folders that belong to no state: of processes that are at work or were
            killed, or somebody else's.
    """

    states: int
    damaged: Mapping[str, str]
    unlisted: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every state can be read and found."""
        return not self.damaged and not self.unlisted


@dataclass(frozen=True)
class Stats:
    """How much a memory store holds.

    Args:
        states (`int`): the number of states in the index.
        sources (`int`): the number of different sources.
        tokens (`int`): the tokens of all texts.
        nbytes (`int`): the size of the states' files.
        models (`Mapping[str, int]`): how many states each model wrote, by fingerprint.
    """

    states: int
    sources: int
    tokens: int
    nbytes: int
    models: Mapping[str, int]


def verify(index: Index) -> Report:
    """See `MemoryStore.verify`."""
    with index.reading() as connection:
        for (wrong,) in connection.execute("PRAGMA integrity_check"):
            if wrong != "ok":
                raise sqlite3.DatabaseError(wrong)
        listed = [key for (key,) in connection.execute("SELECT key FROM states ORDER BY key")]
        if wrong := [key for key in listed if not re.fullmatch("[0-9a-f]{32}", str(key))]:
            raise sqlite3.DatabaseError(f"it has invalid keys, such as {wrong[0]!r}")
        files, leftovers = _files(index)
        keys = dict.fromkeys([*listed, *files])
        damaged, unlisted = _check(index, connection, keys)
    if damaged or unlisted:  # check again under the lock: another process may be at work
        with suppress(OSError), index.writing() as connection:
            damaged, unlisted = _check(index, connection, [*damaged, *unlisted])
    named = {key: str(error) for key, error in damaged.items()}
    return Report(len(keys) - len(damaged) - len(unlisted), named, tuple(unlisted), tuple(leftovers))


def _check(
    index: Index, connection: sqlite3.Connection, keys: Collection[str]
) -> tuple[dict[str, Exception], list[str]]:
    """By key, why states cannot be read; and the keys of whole states that the index lacks or describes differently."""
    damaged: dict[str, Exception] = {}
    unlisted = []
    for key in keys:
        entries = {entry.place: entry for entry in select(connection, "key = ?", (key,))}
        file = state_file_of(index.states, key)
        try:
            stored = {entry.place: entry for entry in read_memory(file)[1]}
        except FileNotFoundError:
            if entries:  # otherwise it was removed in the meantime
                damaged[key] = MemoryStateError("Its file is missing.")
        except (MemoryStateError, OSError) as error:
            damaged[key] = error
        else:
            if stored != entries:
                unlisted.append(key)
    return damaged, unlisted


def _files(index: Index) -> tuple[list[str], list[str]]:
    """The keys that have a file, and the names of files and folders that belong to no state."""
    keys, others = [], [path.name for path in index.folder.glob(f"{PREFIX}*")]
    for path in sorted(index.states.rglob("*")):
        name = path.relative_to(index.states).as_posix()
        match = _NAME.fullmatch(name)
        if match and path.is_file():
            keys.append(match[2])
        elif not path.is_dir() or not re.fullmatch("[0-9a-f]{2}", name):
            others.append(f"{index.states.name}/{name}")
    return keys, others


def gc(index: Index, keep: Collection[str] | None = None) -> list[str]:
    """See `MemoryStore.gc`."""
    keep = _keys(index, "keep", keep)
    sweep(index.folder)
    if not index.exists():
        return []
    report = verify(index)
    if report.ok and keep is None and not left(index):
        return []

    def work(connection: sqlite3.Connection, remove: Callable[[str], None]) -> list[str]:
        settle(index, connection)
        damaged, unlisted = _check(index, connection, [*report.damaged, *report.unlisted])
        for key in unlisted:
            insert(connection, read_file(state_file_of(index.states, key))[1])
        gone = [key for key, error in damaged.items() if not isinstance(error, OSError)]  # others may be readable later
        if keep is not None:
            kept = {*keep, *gone}
            gone += [key for (key,) in connection.execute("SELECT key FROM states ORDER BY key") if key not in kept]
        for key in gone:
            remove(key)
        _overwrite(connection)
        return gone

    return removing(index, work)


def delete(index: Index, keys: str | Iterable[str]) -> None:
    """See `MemoryStore.delete`."""
    check_kind("keys", keys, Iterable, "a key or a list of keys")
    keys = _keys(index, "keys", keys) or []

    def work(_: sqlite3.Connection, remove: Callable[[str], None]) -> None:
        for key in keys:
            remove(key)

    if keys and index.exists():
        removing(index, work)


def forget(index: Index, source: str, keys: Collection[str] | None = None) -> int:
    """See `MemoryStore.forget`."""
    keys = _keys(index, "keys", keys)
    if not index.exists():
        return 0
    with temporary_directory(index.folder) as folder:

        def work(connection: sqlite3.Connection, remove: Callable[[str], None]) -> int:
            count = 0
            found = dict.fromkeys(entry.key for entry in select(connection, "source = ?", (source,)))
            for key in (key for key in found if keys is None or key in keys):
                entries = list(select(connection, "key = ?", (key,)))
                others = [entry for entry in entries if entry.source != source]
                if others:
                    _keep_places(index, connection, folder / key, others)
                else:
                    remove(key)
                    count += 1
            if count:
                _overwrite(connection)
            return count

        return removing(index, work)


def _keys(index: Index, name: str, keys: Iterable[str] | None) -> set[str] | None:
    """Keys as a set, of a list or a single key; `ValueError` if one is invalid."""
    check_kind(name, keys, Iterable | None, "a list of keys")
    if keys is None:
        return None
    keys = [keys] if isinstance(keys, str) else list(keys)
    for key in keys:
        state_file_of(index.states, key)
    return set(keys)


def _keep_places(index: Index, connection: sqlite3.Connection, new: Path, entries: list[Entry]) -> None:
    file = state_file_of(index.states, entries[0].key)
    with suppress(FileNotFoundError, MemoryStateError):  # `verify` reports it
        tensors, _ = read_file(file)
        entries = write_file(new, tensors, entries)
        new.replace(file)
    insert(connection, entries)


def _overwrite(connection: sqlite3.Connection) -> None:
    """Merge the parts of the full-text index: until then it still holds the words of deleted texts."""
    connection.execute("INSERT INTO texts(texts) VALUES ('optimize')")


def rebuild(index: Index) -> Report:
    """See `MemoryStore.rebuild`."""
    damaged, states = {}, 0
    with index.replacing() as connection:
        for key in _files(index)[0]:
            try:
                insert(connection, read_file(state_file_of(index.states, key))[1])
                states += 1
            except (MemoryStateError, OSError) as error:
                damaged[key] = str(error)
    return Report(states, damaged, leftovers=tuple(_files(index)[1]))  # only now, as our own temporary folder is gone


def stats(index: Index) -> Stats:
    """See `MemoryStore.stats`."""
    with index.reading() as connection:
        counts = connection.execute(
            "SELECT count(*), ifnull(sum(tokens), 0), ifnull(sum(nbytes), 0) FROM states"
        ).fetchone()
        sources = connection.execute("SELECT count(DISTINCT source) FROM places").fetchone()
        models = connection.execute("SELECT fingerprint, count(*) FROM states GROUP BY fingerprint")
        return Stats(counts[0], sources[0], counts[1], counts[2], dict(models.fetchall()))
