"""How states enter a memory store: first their files, then the index."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from torch import Tensor

from gradmem_adapter.state import MemoryState, check_state
from gradmem_adapter.store import files
from gradmem_adapter.store.entry import Entry, Place
from gradmem_adapter.store.index import Index, entries_of, insert, select
from gradmem_adapter.utils.files import errors_named
from gradmem_adapter.utils.kinds import check_kind
from gradmem_adapter.utils.state_file import MemoryStateError, widened
from gradmem_adapter.utils.temporary import temporary_directory
from gradmem_adapter.utils.wording import counted

_FILES_AT_ONCE = 16
"""Files flushed to disk at the same time: flushing takes most of the time of storing."""
_NOWHERE: Place = (None, None, None)


def put(index: Index, states: MemoryState, entries: Iterable[Entry], dtype: files.Dtype | None) -> None:
    """See `MemoryStore.put`."""
    check_state("states", states)
    check_kind("entries", entries, Iterable, "a list with an Entry for each state")
    entries = list(entries)
    if len(entries) != len(states):
        told = f"Got {counted(len(entries), 'entry')} for {counted(len(states), 'state')}: pass one for each state."
        raise ValueError(told)
    states, now = states.cpu(), time.time()
    finite = states.vectors.isfinite().flatten(1).all(1).tolist()
    tensors = {name: tensor.split(1) for name, tensor in files.new_tensors(states, dtype).items()}
    found: list[tuple[Mapping[str, Tensor], list[Entry]]] = []
    for i, (tokens, entry) in enumerate(zip(states.context_tokens.tolist(), entries, strict=True)):
        check_kind(f"Entry {i}", entry, Entry, "an Entry")
        if not finite[i]:
            raise ValueError(
                f"The state of {entry.key} has vectors that are not finite: WRITE diverged. Use a smaller write "
                "learning rate."
            )
        entry = replace(entry, tokens=tokens, fingerprint=states.fingerprint, written=now)
        found.append(({name: parts[i] for name, parts in tensors.items()}, [entry]))
    _land(index, found)


def add_places(index: Index, entries: Sequence[Entry]) -> bool:
    """Add what is new about stored texts (places, metadata, or the text itself) to their files and the index.

    Args:
        index (`Index`): the store's index.
        entries (`Sequence[Entry]`): entries of texts whose states had a file.

    Returns:
        `bool`: whether all states still have a file. Those removed in the meantime are skipped.
    """
    with index.reading() as connection:
        known = {(entry.key, entry.place): entry for entry in entries_of(connection, {entry.key for entry in entries})}
    new: dict[str, list[Entry]] = {}
    for entry in entries:
        stored = known.get((entry.key, entry.place))
        if stored is None or entry.metadata not in ({}, stored.metadata) or (entry.text and not stored.text):
            new.setdefault(entry.key, []).append(entry)
    if not new:
        return True
    index.make()
    with temporary_directory(index.folder) as folder:
        noted = [_add_places(index, folder / key, key, lacking) for key, lacking in new.items()]
    return all(noted)


def _add_places(index: Index, new: Path, key: str, lacking: Sequence[Entry]) -> bool:
    """Add what is new about one state; `False` if the state was removed."""
    file = files.state_file_of(index.states, key)
    with index.writing() as connection:  # otherwise a place that another process is forgetting could come back
        try:
            tensors, before = files.read_file(file)
        except FileNotFoundError:
            return False
        one = replace(before[0], text=before[0].text or lacking[0].text)
        entries = [replace(one, **place) for place in _places(before, lacking)]
        with errors_named(index.states):
            entries = files.write_file(new, tensors, entries)
        os.replace(new, file)
        insert(connection, entries)
    return True


def _land(index: Index, found: Sequence[tuple[Mapping[str, Tensor], list[Entry]]]) -> None:
    """Put the files of states in their places and enter them in the index, keeping what was known about them."""
    index.make()
    with temporary_directory(index.folder) as folder:
        new_files = [folder / str(number) for number in range(len(found))]
        with errors_named(index.states), ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
            written = list(threads.map(files.write_file, new_files, *zip(*found, strict=True)))
        with index.writing() as connection:
            for (tensors, _), new, entries in zip(found, new_files, written, strict=True):
                file = files.state_file_of(index.states, entries[0].key)
                stored, before = _stored(index, connection, entries[0].key)
                if before:  # it was stored before, maybe by another process just now
                    entries = _with_known(entries, before)
                    if _bits(tensors) == _bits(stored):  # equal when read: keep the smaller tensors
                        tensors, known = stored, before[0]
                        entries = [replace(one, written=known.written, nbytes=known.nbytes) for one in entries]
                        if all(one in before for one in entries):
                            insert(connection, entries)
                            continue
                    entries = files.write_file(new, tensors, entries)
                file.parent.mkdir(parents=True, exist_ok=True)
                os.replace(new, file)
                insert(connection, entries)


def _stored(index: Index, connection: Connection, key: str) -> tuple[Mapping[str, Tensor], list[Entry]]:
    """A state's tensors and entries. If its file is damaged or missing, no tensors, and the entries of the index."""
    try:
        return files.read_file(files.state_file_of(index.states, key))
    except (FileNotFoundError, MemoryStateError):
        return {}, list(select(connection, "key = ?", (key,)))


def _with_known(new: Sequence[Entry], before: Sequence[Entry]) -> list[Entry]:
    """New entries of a state, completed by what was known before: its text, how it was written, its places."""
    one = replace(new[0], text=new[0].text or before[0].text, options=new[0].options or before[0].options)
    said = [entry for entry in new if entry.place != _NOWHERE or entry.metadata]
    return [replace(one, **place) for place in _places(before, said)]


def _places(before: Sequence[Entry], new: Sequence[Entry]) -> list[dict[str, Any]]:
    """The known places of a state and the new ones; new metadata replace those of the same place."""
    places = {one.place: one for one in [*new, *before, *(one for one in new if one.metadata)]}
    return [{name: getattr(one, name) for name in files.OF_A_PLACE} for one in places.values()]


def _bits(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The bytes of the values that are read from tensors. Compared as bytes, NaN equals NaN."""
    return {name: tensor.double().numpy().tobytes() for name, tensor in widened(tensors).items()}
