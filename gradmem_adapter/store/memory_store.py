"""A directory of memory states with an index."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.state import MemoryState
from gradmem_adapter.store import files, upkeep
from gradmem_adapter.store.choose import Choice, choose
from gradmem_adapter.store.claims import Claims
from gradmem_adapter.store.embedding import Embedding
from gradmem_adapter.store.entry import Entry, places, state_key, write_identity
from gradmem_adapter.store.errors import UnknownStateError
from gradmem_adapter.store.index import Index, entries_of, insert, places_of, select
from gradmem_adapter.store.likelihood import by_likelihood
from gradmem_adapter.utils.state_file import MemoryStateError
from gradmem_adapter.utils.temporary import temporary_directory
from gradmem_adapter.utils.tokens import text_list
from gradmem_adapter.write.batching import progress_bar
from gradmem_adapter.write.options import WriteFields, WriteOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

Dtype = Literal["float32", "bfloat16", "int8"]
_AT_ONCE = 256
"""Texts that are given to the pipeline together, whose states are all in memory then."""
_FILES_AT_ONCE = 16
"""Files that wait for the disk together: most of the time that storing takes is this."""


class MemoryStore:
    """Many memory states on disk: what was written once is found again, by key, by source or by what it says.

    ```python
    store = MemoryStore("states")
    keys = store.add(pipeline, texts, sources=names)
    pipeline.generate("A question?", memory=store.get(keys[0]))
    ```

    The files of the states hold everything; the index beside them can be made anew (`rebuild`). Threads and processes
    of one machine may write to a store at once, and may be killed at any time.

    Args:
        path (`str` or `PathLike`): the directory; the first state makes it.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): of the vectors in files that are written from now on:
            `"float32"`, `"bfloat16"`, or `"int8"` with a scale for each vector. What is read is float32.
        keep_text (`bool`, *optional*, defaults to `True`): keep the texts beside the states, so that answers can be
            cited, states be found by words, and texts be written anew for another model.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, path: str | os.PathLike[str], *, dtype: Dtype = "bfloat16", keep_text: bool = True) -> None:
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype must be one of {get_args(Dtype)}, got {dtype!r}.")
        self.path = Path(path)
        self.dtype = dtype
        self.keep_text = keep_text
        self.index = Index(self.path)
        self._claims = Claims()

    def __reduce__(self) -> tuple[Callable[..., MemoryStore], tuple[Any, ...]]:
        """A copy shares the directory, and does not wait for what threads are writing here."""
        return partial(MemoryStore, dtype=self.dtype, keep_text=self.keep_text), (self.path,)

    # ---------------------------------------------------------------- write

    def key(self, pipeline: GradMemPipeline, text: str, options: WriteOptions | None = None) -> str:
        """The key that a text's state has, whether or not it is stored: model, way of writing and text decide it.

        Args:
            pipeline (`GradMemPipeline`): who would write.
            text (`str`): one text.
            options (`WriteOptions`, *optional*): how to write; None: as the adapter's configuration says.
        """
        identity = write_identity(pipeline.model.active_peft_config, options or WriteOptions())
        return state_key(text, pipeline.model.fingerprint(), identity)

    def add(
        self,
        pipeline: GradMemPipeline,
        texts: str | Sequence[str],
        *,
        sources: str | Sequence[str | None] | None = None,
        offsets: Sequence[tuple[int, int]] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int | None = None,
        progress: bool | None = False,
        done: Callable[[list[str]], None] = lambda keys: None,
        options: WriteOptions | None = None,
        **fields: Unpack[WriteFields],
    ) -> list[str]:
        """The keys of texts. Those that are not stored, or damaged, are written, in batches that fit into memory.

        Each batch is stored as soon as it is written, so that what fails later loses nothing. Threads that ask for one
        text at the same time write it once.

        Args:
            pipeline (`GradMemPipeline`): who writes.
            texts (`str` or `Sequence[str]`): one text or any number, of lengths that the model takes.
            sources (`str` or `Sequence`, *optional*): where each comes from, such as a file's name; or all of them.
            offsets (`Sequence[tuple[int, int]]`, *optional*): where each begins and ends in its source, in characters.
            metadata (`Sequence[Mapping]`, *optional*): what else there is to say of each, as JSON has it.
            max_tokens (`int`, *optional*): a batch's tokens, padding counted; None: what the device has memory for.
            progress (`bool`, *optional*, defaults to `False`): show a progress bar; None: where stderr is a terminal.
            done (`Callable`, *optional*): given the keys of each batch as soon as it is stored.
            options (`WriteOptions`, *optional*): how to write; None: as the adapter's configuration says.
            fields: the fields of `WriteOptions` by themselves, in place of those of `options`.

        Returns:
            `list[str]`: a key for each text, in order.

        Raises:
            TypeError, ValueError: a text cannot be written, whose number the message names; or what no entry can have.
            MemoryStoreError: the index is damaged.
            OSError: the store cannot be written.
        """
        options = WriteOptions.of(options, **fields)
        texts = text_list(texts)
        identity, fingerprint = write_identity(pipeline.model.active_peft_config, options), pipeline.model.fingerprint()
        entries = [
            replace(entry, key=state_key(text, fingerprint, identity), text=text if self.keep_text else None)
            for text, entry in zip(texts, places(len(texts), sources, offsets, metadata, identity), strict=True)
        ]
        number = {entry.key: i for i, entry in reversed(list(enumerate(entries)))}
        waiting = sorted(number, key=number.__getitem__)
        with progress_bar(len(waiting), progress) as advance:

            def stored(keys: list[str]) -> None:
                advance(len(keys))
                done(keys)

            while waiting:
                with self._claims.taken(waiting) as mine:
                    missing = [number[key] for key in mine if not self._is_readable(key)]
                    advance(len(mine) - len(missing))
                    for begin in range(0, len(missing), _AT_ONCE):
                        part = missing[begin : begin + _AT_ONCE]
                        given = {i: (texts[i], entries[i]) for i in part}
                        self._write(pipeline, given, stored, max_tokens=max_tokens, options=options)
                waiting = sorted(set(waiting).difference(mine), key=number.__getitem__)  # others may have failed
        self._add_places(entries)
        return [entry.key for entry in entries]

    def _write(
        self,
        pipeline: GradMemPipeline,
        given: Mapping[int, tuple[str, Entry]],
        stored: Callable[[list[str]], None],
        **how: Any,
    ) -> None:
        """Write texts, whose numbers are for messages."""
        numbers = list(given)

        def put(rows: list[int], states: MemoryState) -> None:
            entries = [given[numbers[i]][1] for i in rows]
            self.put(states, entries)
            stored([entry.key for entry in entries])

        try:
            pipeline.write_many([text for text, _ in given.values()], progress=False, done=put, **how)
        except (TypeError, ValueError, torch.OutOfMemoryError) as error:
            if not (match := re.match(r"Context (\d+)", str(error))):
                raise
            raise type(error)(f"Context {numbers[int(match[1])]}{str(error)[match.end() :]}") from error

    def put(self, states: MemoryState, entries: Iterable[Entry]) -> None:
        """Store states that were written elsewhere, in the place of what there is under their keys.

        Args:
            states (`MemoryState`): any number.
            entries (`Iterable[Entry]`): one for each, with what `key` says; what the states say of themselves is taken
                from them.

        Raises:
            ValueError: no key, vectors that are not finite, or more or fewer entries than states.
            OSError: they cannot be written; none is stored then.
        """
        now = time.time()
        found: list[tuple[Mapping[str, Tensor], list[Entry]]] = []
        for state, entry in zip(states.cpu(), entries, strict=True):
            if not state.vectors.isfinite().all():
                raise ValueError(f"The state of {entry.key} has vectors that are not finite: WRITE diverged.")
            entry = replace(entry, tokens=int(state.context_tokens), fingerprint=state.fingerprint, written=now)
            found.append((files.new_tensors(state, self.dtype), [entry]))
        self._land(found)

    def _add_places(self, entries: Sequence[Entry]) -> None:
        """Note what is new of stored texts: places, metadata, or that they are kept; enter what the index lacks."""
        with self.index.reading() as connection:
            stored_entries = entries_of(connection, {entry.key for entry in entries})
            known = {(entry.key, entry.place): entry for entry in stored_entries}
        new: dict[str, list[Entry]] = {}
        for entry in entries:
            stored = known.get((entry.key, entry.place))
            if stored is None or entry.metadata not in ({}, stored.metadata) or (entry.text and not stored.text):
                new.setdefault(entry.key, []).append(entry)
        for key, lacking in new.items():
            tensors, before = files.read_file(self._file(key))
            places = {one.place: one for one in [*lacking, *before, *(one for one in lacking if one.metadata)]}
            one = replace(before[0], text=before[0].text or lacking[0].text)
            self._land([(tensors, [replace(one, **_place(other)) for other in places.values()])])

    def _land(self, found: Sequence[tuple[Mapping[str, Tensor], list[Entry]]]) -> None:
        """Put the files of states into their places and into the index; places that it knows stay."""
        self.index.make()
        with temporary_directory(self.path) as folder:
            new_files = [folder / str(number) for number in range(len(found))]
            with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
                written = list(threads.map(files.write_file, new_files, *zip(*found, strict=True)))
            with self.index.writing() as connection:
                for (tensors, _), new, entries in zip(found, new_files, written, strict=True):
                    file = self._file(entries[0].key)
                    found_at = {one.place: _place(one) for one in select(connection, "key = ?", (entries[0].key,))}
                    found_at |= {entry.place: _place(entry) for entry in entries}
                    if len(found_at) > len(entries):  # another process has found it elsewhere meanwhile
                        entries = [replace(entries[0], **place) for place in found_at.values()]
                        entries = files.write_file(new, tensors, entries)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(new, file)
                    insert(connection, entries)

    # ---------------------------------------------------------------- read

    def get(self, keys: str | Sequence[str], fingerprint: str | None = None) -> MemoryState:
        """States, in the order of their keys, on the CPU.

        Args:
            keys (`str` or `Sequence[str]`): one key or several.
            fingerprint (`str`, *optional*): of the model that is to read them; None: any model's states.

        Raises:
            UnknownStateError: a state is not in this store.
            MemoryStateError: a state is damaged, or another model than `fingerprint` wrote it.
            ValueError: no key.
        """
        return MemoryState.stack([self._get(key, fingerprint) for key in ([keys] if isinstance(keys, str) else keys)])

    def _get(self, key: str, fingerprint: str | None) -> MemoryState:
        try:
            state, _ = files.read_memory(self._file(key))
        except FileNotFoundError:
            lost = "If the index has it, its file was deleted, which gc puts right."
            raise UnknownStateError(f"There is no memory state {key!r} in {str(self.path)!r}. {lost}") from None
        except MemoryStateError as error:
            raise MemoryStateError(f"The stored state {key!r} cannot be read: {error}") from error
        if fingerprint is not None and state.fingerprint != fingerprint:
            raise MemoryStateError(
                f"The stored state {key!r} was written by model {state.fingerprint}, and this is model {fingerprint}: "
                "it would be read as noise. Write the text again with this model."
            )
        return state

    def entries(self, source: str | None = None) -> Iterator[Entry]:
        """What is stored, in the order of sources and places; a text that was found at several has an entry for each.

        Args:
            source (`str`, *optional*): only those of this source.

        Yields:
            `Entry`: of what there was at the beginning, without what is removed before it is its turn.
        """
        with self.index.reading() as connection:
            found = places_of(connection, source)
        for begin in range(0, len(found), _AT_ONCE):  # between which nobody is kept waiting, however slowly it is read
            part = found[begin : begin + _AT_ONCE]
            with self.index.reading() as connection:
                known = {(entry.key, entry.place): entry for entry in entries_of(connection, {key for key, _ in part})}
            yield from [known[one] for one in part if one in known]

    def choose(
        self,
        pipeline: GradMemPipeline,
        query: str,
        k: int = 4,
        *,
        source: str | None = None,
        embedding: Embedding | None = None,
        shortlist: int = 0,
    ) -> list[Choice]:
        """The states that a question needs, the best first: those whose texts have its words.

        Words count by BM25, without their English endings and without those that only make a question. A language
        written without spaces between words needs an embedding.

        Args:
            pipeline (`GradMemPipeline`): who is to read; states of other models are passed over.
            query (`str`): the question.
            k (`int`, *optional*, defaults to `4`): how many states at most.
            source (`str`, *optional*): only states of this source.
            embedding (`Embedding`, *optional*): what the meaning of texts counts by, beside their words. Its vectors
                are kept in the index; texts that have none yet are embedded first.
            shortlist (`int`, *optional*, defaults to `0`): of so many of the best it counts, too, how well each state
                explains the question. The model reads the question from each: worth it for `k=1`.

        Returns:
            `list[Choice]`: fewer than `k` where fewer texts have a word of the question.

        Raises:
            ValueError: `k` is less than 1; the store has no state of this model, or no texts; an embedding that does
                not fit.
            MemoryStoreError, MemoryStateError: the index, or a state of the shortlist, is damaged.
            OSError: vectors cannot be stored.
        """
        fingerprint = pipeline.model.fingerprint()
        found = choose(self.index, fingerprint, query, k, source, embedding, shortlist)
        return by_likelihood(pipeline, query, found, self.get)[:k] if shortlist else found

    def exists(self) -> bool:
        """Whether there is a store in the directory, if only an empty or a damaged one."""
        return self.index.path.exists() or any(self.index.states.glob("[0-9a-f]?/*.safetensors"))

    def __len__(self) -> int:
        """The number of states."""
        with self.index.reading() as connection:
            return int(connection.execute("SELECT count(*) FROM states").fetchone()[0])

    def __contains__(self, key: str) -> bool:
        """Whether the index has a state of this key."""
        with self.index.reading() as connection:
            return connection.execute("SELECT 1 FROM states WHERE key = ?", (key,)).fetchone() is not None

    def __iter__(self) -> Iterator[str]:
        """The keys of all states, those that were stored first at the front."""
        with self.index.reading() as connection:
            found = connection.execute("SELECT key FROM states ORDER BY id").fetchall()
        return (key for (key,) in found)

    # ---------------------------------------------------------------- upkeep

    def stats(self) -> upkeep.Stats:
        """How much there is."""
        return upkeep.stats(self.index)

    def verify(self) -> upkeep.Report:
        """Read every state and compare it with the index; nothing is changed.

        Raises:
            MemoryStoreError: the index is damaged or lost; see `rebuild`.
        """
        return upkeep.verify(self.index)

    def gc(self, keep: Collection[str] | None = None) -> list[str]:
        """Remove what killed processes left and what cannot be read, and enter what the index lacks.

        Args:
            keep (`Collection[str]`, *optional*): keys; all other states go, too. None: all whole ones stay.

        Returns:
            `list[str]`: the keys of the states that are gone.
        """
        return upkeep.gc(self.index, keep)

    def forget(self, source: str) -> int:
        """Remove all that comes from a source, from the disk too.

        Args:
            source (`str`): its name. A state whose text another source has, too, stays for that.

        Returns:
            `int`: how many states are gone.
        """
        return upkeep.forget(self.index, source)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove states, wherever their texts come from. Some of their words may stay in the index until `gc`.

        Args:
            keys (`Iterable[str]`): of the states; those that are not there are passed over.

        Raises:
            ValueError: no key; nothing is removed then.
        """
        upkeep.delete(self.index, keys)

    def rebuild(self) -> upkeep.Report:
        """Make the index anew from the states' files, whatever has become of it.

        Embeddings are lost, and made anew where they are asked for. Who reads or writes is waited for.
        """
        return upkeep.rebuild(self.index)

    def _file(self, key: str) -> Path:
        return files.state_file_of(self.index.states, key)

    def _is_readable(self, key: str) -> bool:
        try:
            files.read_file(self._file(key))
        except FileNotFoundError:
            return False
        except MemoryStateError as error:
            warnings.warn(f"The stored state {key!r} is written anew, as it cannot be read: {error}", stacklevel=4)
            return False
        return True


def _place(entry: Entry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in files.OF_A_PLACE}
