"""A directory of memory states with an index."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from gradmem_adapter.outputs import WriteProgress
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.state import MemoryState
from gradmem_adapter.store import files, landing, upkeep
from gradmem_adapter.store.adding import AT_ONCE, text_keys, write_missing
from gradmem_adapter.store.choose import Choice, choose
from gradmem_adapter.store.claims import Claims
from gradmem_adapter.store.embedding import Embedding
from gradmem_adapter.store.entry import Entry, places, state_key, write_identity
from gradmem_adapter.store.errors import UnknownStateError
from gradmem_adapter.store.index import Index, entries_of, places_of
from gradmem_adapter.store.whole import of_segments, whole_in
from gradmem_adapter.utils.files import check_writable
from gradmem_adapter.utils.kinds import check_kind
from gradmem_adapter.utils.state_file import MemoryStateError
from gradmem_adapter.utils.tokens import check_no_file, text_list
from gradmem_adapter.write.batching import progress_bar
from gradmem_adapter.write.options import WriteFields, WriteOptions

_PIPELINE = "a GradMemPipeline, which knows the model"
_AT_ONCE = 256
"""Entries read in one transaction."""


class MemoryStore:
    """Many memory states on disk: what was written once is found again by key, by source or by its text.

    ```python
    store = MemoryStore("states")
    keys = store.add(pipeline, texts, sources=names)
    pipeline.generate("A question?", memory=store.get(keys[0]))
    ```

    The files of the states hold everything; the index beside them can be rebuilt (`rebuild`). Threads and processes of
    one machine may write to a store at once, and may be killed at any time.

    Args:
        path (`str` or `PathLike`): the directory, created with the first state.
        dtype (`str`, *optional*, defaults to `"int8"`): dtype of the vectors in files that `add` writes from now on:
            `"int8"` with a scale for each vector, `"bfloat16"` or `"float32"`. Vectors are read as float32.
        keep_text (`bool`, *optional*, defaults to `True`): keep the texts beside the states, so that answers can be
            cited, states found by words, and texts written again for another model.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, path: str | os.PathLike[str], *, dtype: files.Dtype = "int8", keep_text: bool = True) -> None:
        files.check_dtype(dtype)
        check_kind("path", path, str | os.PathLike, "a path")
        self.path = Path(path)
        self.dtype = dtype
        self.keep_text = keep_text
        self.index = Index(self.path)
        self._claims = Claims()

    def __reduce__(self) -> tuple[Callable[..., MemoryStore], tuple[Any, ...]]:
        """A copy shares the directory, and does not wait for writes of threads here."""
        return partial(MemoryStore, dtype=self.dtype, keep_text=self.keep_text), (self.path,)

    # ---------------------------------------------------------------- write

    def key(self, pipeline: GradMemPipeline, text: str, options: WriteOptions | None = None) -> str:
        """The key of a text's state, stored or not. It depends on the model, the way of writing and the text.

        Args:
            pipeline (`GradMemPipeline`): what would write.
            text (`str`): one text; `keys_of` takes several in the time of one.
            options (`WriteOptions`, *optional*): how to write; None: as the adapter's configuration says.
        """
        return self.keys_of(pipeline, [text], options)[0]

    def keys_of(self, pipeline: GradMemPipeline, texts: list[str], options: WriteOptions | None = None) -> list[str]:
        """The `key` of each text."""
        check_kind("pipeline", pipeline, GradMemPipeline, _PIPELINE)
        return text_keys(pipeline, texts, options or WriteOptions())

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
        callback: Callable[[list[int], WriteProgress], None] | None = None,
        options: WriteOptions | None = None,
        **fields: Unpack[WriteFields],
    ) -> list[str]:
        """Return the keys of texts. Those not stored, or damaged, are first written, in batches that fit into memory.

        Each batch is stored as soon as it is written, so that a later failure loses nothing. Threads that add the same
        text at the same time write it once.

        Args:
            pipeline (`GradMemPipeline`): what writes.
            texts (`str` or `Sequence[str]`): one text or any number, of lengths that the model takes.
            sources (`str` or `Sequence`, *optional*): where each comes from, such as a file's name; or one for all.
            offsets (`Sequence[tuple[int, int]]`, *optional*): where each begins and ends in its source, in characters.
            metadata (`Sequence[Mapping]`, *optional*): anything else about each, in JSON types.
            max_tokens (`int`, *optional*): tokens per batch, padding included; None: what the device has memory for.
            progress (`bool`, *optional*, defaults to `False`): show a progress bar; None: if stderr is a terminal.
            done (`Callable`, *optional*): called with the keys of each batch as soon as it is stored.
            callback (`Callable`, *optional*): called with the numbers of the texts being written together and a
                `WriteProgress`, before each step and after the last.
            options (`WriteOptions`, *optional*): how to write; None: as the adapter's configuration says.
            fields: individual fields of `WriteOptions`, overriding those of `options`.

        Returns:
            `list[str]`: a key for each text, in order.

        Raises:
            TypeError, ValueError: a text cannot be written, or is a file's name without a source; or bad entries.
            MemoryStoreError: the index is damaged.
            OSError: the store cannot be written.
        """
        check_kind("pipeline", pipeline, GradMemPipeline, _PIPELINE)
        options = WriteOptions.of(options, **fields)
        texts = text_list(texts, no_files=sources is None and offsets is None)
        identity, fingerprint = write_identity(pipeline.model.active_peft_config, options), pipeline.model.fingerprint()
        entries = [
            replace(entry, key=state_key(text, fingerprint, identity), text=text if self.keep_text else None)
            for text, entry in zip(texts, places(len(texts), sources, offsets, metadata, identity), strict=True)
        ]
        how: dict[str, Any] = {"max_tokens": max_tokens, "options": options, "callback": callback}
        put, noted = partial(self.put, dtype=self.dtype), False
        while not noted:  # repeat if another process has removed a state in the meantime
            write_missing(self.index, self._claims, pipeline, texts, entries, put, done, progress, **how)
            noted = landing.add_places(self.index, entries)
        return [entry.key for entry in entries]

    def add_document(
        self,
        pipeline: GradMemPipeline,
        text: str | Iterable[str] | Iterable[int],
        *,
        source: str | None = None,
        segment_tokens: int | None = None,
        overlap: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        progress: bool | None = False,
        **how: Any,
    ) -> list[str]:
        """Return the keys of a long text's segments, in order. Those not stored, or damaged, are first written.

        What was stored before an interruption is not written again: the same call continues. For a string, `is_whole`
        tells what is not stored to its end. For a text in pieces, only the segments written together are held.

        Args:
            pipeline (`GradMemPipeline`): what writes.
            text (`str`, `Iterable[str]` or `Iterable[int]`): a text of any length, as for `pipeline.segments`.
            source (`str`, *optional*): where it comes from; each entry says where in it its segment begins and ends.
            segment_tokens, overlap: as for `pipeline.segments`.
            metadata (`Mapping`, *optional*): anything else about each segment, in JSON types.
            progress (`bool`, *optional*, defaults to `False`): show a progress bar; None: if stderr is a terminal.
            how: other arguments of `add`: done, max_tokens, options, fields.

        Raises:
            TypeError, ValueError: a text cannot be cut or written, or is the name of a file; see `add`.
            MemoryStoreError, OSError: as for `add`.
        """
        check_kind("pipeline", pipeline, GradMemPipeline, _PIPELINE)
        check_no_file(text, ", which is read as it is needed")
        keys: list[str] = []
        segments = pipeline.segments(text, segment_tokens, overlap)
        if isinstance(text, str):
            found = list(segments)
            segments, metadata = iter(found), of_segments(found, metadata)
        with progress_bar(None, progress) as advance:
            while part := list(itertools.islice(segments, AT_ONCE)):
                keys += self.add(
                    pipeline,
                    [segment.text for segment in part],
                    sources=source,
                    offsets=[(segment.start, segment.end) for segment in part],
                    metadata=None if metadata is None else [metadata] * len(part),
                    **how,
                )
                advance(len(part))
        if not keys:
            raise ValueError("There is no text to write: the document is empty.")
        return keys

    def put(self, states: MemoryState, entries: Iterable[Entry], *, dtype: files.Dtype | None = None) -> None:
        """Store states that were written elsewhere, replacing those with the same keys.

        Args:
            states (`MemoryState`): any number of states.
            entries (`Iterable[Entry]`): one for each, with its `key`. What an entry leaves out stays as it was.
            dtype (`str`, *optional*): dtype of the vectors in files, as for `MemoryStore`. None: the states' own.

        Raises:
            ValueError: an invalid key or dtype, vectors that are not finite, or more or fewer entries than states.
            OSError: they cannot be written; none is in the index then, and the same call again enters them.
        """
        landing.put(self.index, states, entries, dtype)

    def check_writable(self) -> None:
        """Raise `OSError` unless states can be stored, before the work of writing them. Stored ones can be read."""
        there = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        check_writable(there / self.index.path.name)

    # ---------------------------------------------------------------- read

    def get(self, keys: str | Sequence[str], fingerprint: str | None = None) -> MemoryState:
        """Read states onto the CPU, in the order of their keys.

        Args:
            keys (`str` or `Sequence[str]`): one key or several.
            fingerprint (`str`, *optional*): that of the model that is to read them; None: allow any model's states.

        Raises:
            UnknownStateError: a state is not in this store.
            MemoryStateError: a state is damaged, or another model than `fingerprint` wrote it.
            ValueError: no key, or an invalid one.
        """
        check_kind("keys", keys, Iterable, "a key or a list of keys")
        if not (keys := [keys] if isinstance(keys, str) else list(keys)):
            raise ValueError("Got no keys: pass the key of at least one memory state.")
        return MemoryState.stack([self._get(key, fingerprint) for key in keys])

    def _get(self, key: str, fingerprint: str | None) -> MemoryState:
        try:
            state, _ = files.read_memory(files.state_file_of(self.index.states, key))
        except FileNotFoundError:
            lost = "If the index lists it, its file was deleted: MemoryStore.gc() corrects the index."
            raise UnknownStateError(f"There is no memory state {key!r} in {str(self.path)!r}. {lost}") from None
        except MemoryStateError as error:
            raise MemoryStateError(f"The stored state {key!r} cannot be read: {error}") from error
        if fingerprint is not None and state.fingerprint != fingerprint:
            raise MemoryStateError(
                f"The stored state {key!r} was written by model {state.fingerprint}, but this is model {fingerprint}, "
                "which would read it as noise. Write the text again with this model."
            )
        return state

    def entries(self, source: str | None = None) -> Iterator[Entry]:
        """What is stored, ordered by source and place; a text found in several places has an entry for each.

        Args:
            source (`str`, *optional*): only the entries of this source.

        Yields:
            `Entry`: of what was stored at the beginning, except what is removed before its turn.
        """
        with self.index.reading() as connection:
            found = places_of(connection, source)
        for begin in range(0, len(found), _AT_ONCE):  # no lock is held between parts, however slowly the caller reads
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
        keys: str | Iterable[str] | None = None,
        whole: bool = False,
        embedding: Embedding | None = None,
    ) -> list[Choice]:
        """The states that a question needs, best first: those whose texts share words with it.

        Words are weighted by BM25, without their English endings and without those that only form a question. Languages
        written without spaces between words need an embedding.

        Args:
            pipeline (`GradMemPipeline`): what is to read them; states of other models are ignored.
            query (`str`): the question.
            k (`int`, *optional*, defaults to `4`): the most states to return.
            source (`str`, *optional*): only states of this source.
            keys (`str` or `Iterable[str]`, *optional*): only these states.
            whole (`bool`, *optional*, defaults to `False`): only states of texts that are stored to their ends (see
                `is_whole`).
            embedding (`Embedding`, *optional*): scores the meaning of texts, in addition to their words. Its vectors
                are kept in the index; texts without one are embedded first.

        Returns:
            `list[Choice]`: fewer than `k` if fewer texts have a word of the question.

        Raises:
            ValueError: `k` is less than 1; the store has no state of this model, or no texts; the embedding does not
                fit.
            MemoryStoreError: the index is damaged.
            OSError: vectors cannot be stored.
        """
        check_kind("pipeline", pipeline, GradMemPipeline, _PIPELINE)
        fingerprint = pipeline.model.fingerprint()
        return choose(self.index, fingerprint, query, k, source, embedding, keys=keys, whole=whole)

    def is_whole(self, entry: Entry) -> bool:
        """Whether the document that an entry is a segment of is stored to its end, with nothing missing.

        Args:
            entry (`Entry`): one whose metadata have the number of `segments`; others are taken as whole texts.
        """
        check_kind("entry", entry, Entry, "an Entry, as entries() gives them")
        with self.index.reading() as connection:
            return whole_in(connection)(entry)

    def exists(self) -> bool:
        """Whether there is a store in the directory, even an empty or damaged one."""
        return self.index.path.exists() or any(self.index.states.glob("[0-9a-f]?/*.safetensors"))

    def __len__(self) -> int:
        """The number of states."""
        with self.index.reading() as connection:
            return int(connection.execute("SELECT count(*) FROM states").fetchone()[0])

    def __contains__(self, key: str) -> bool:
        """Whether the index has a state with this key."""
        with self.index.reading() as connection:
            return connection.execute("SELECT 1 FROM states WHERE key = ?", (key,)).fetchone() is not None

    def __iter__(self) -> Iterator[str]:
        """The keys of all states, in the order in which they were stored."""
        with self.index.reading() as connection:
            found = connection.execute("SELECT key FROM states ORDER BY id").fetchall()
        return (key for (key,) in found)

    # ---------------------------------------------------------------- upkeep

    def stats(self) -> upkeep.Stats:
        """How much the store holds."""
        return upkeep.stats(self.index)

    def verify(self) -> upkeep.Report:
        """Read every state and compare it with the index; nothing is changed.

        Raises:
            MemoryStoreError: the index is damaged or lost; see `rebuild`.
        """
        return upkeep.verify(self.index)

    def gc(self, keep: Collection[str] | None = None) -> list[str]:
        """Remove what killed processes left and what cannot be read, and add to the index what it lacks.

        Args:
            keep (`Collection[str]`, *optional*): keys; all other states are removed. None: all whole ones stay. If
                something in it is not a key, `ValueError` is raised and nothing is removed.

        Returns:
            `list[str]`: the keys of the removed states.
        """
        return upkeep.gc(self.index, keep)

    def forget(self, source: str, keys: Collection[str] | None = None) -> int:
        """Remove what comes from a source, from the disk as well.

        The time grows with the store: to overwrite the words of these texts, those of all are written again. `delete`
        leaves them.

        Args:
            source (`str`): its name. A state whose text also comes from another source stays for that one.
            keys (`Collection[str]`, *optional*): which of the source's states to remove. None: all of them.

        Returns:
            `int`: how many states were removed.

        Raises:
            ValueError: something is not a key; nothing is removed then.
        """
        return upkeep.forget(self.index, source, keys)

    def delete(self, keys: str | Iterable[str]) -> None:
        """Remove states, wherever their texts come from. Some of their words may stay in the index until `gc`.

        Args:
            keys (`str` or `Iterable[str]`): keys of the states; those not in the store are ignored.

        Raises:
            ValueError: something is not a key; nothing is removed then.
        """
        upkeep.delete(self.index, keys)

    def rebuild(self) -> upkeep.Report:
        """Rebuild the index from the states' files, whatever its condition.

        Embeddings are lost, and computed again when needed. Waits for whoever is reading or writing.
        """
        return upkeep.rebuild(self.index)
