"""Memory states by reference: a memory store with LangChain's store interface."""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import tempfile
import threading
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from langchain_core.documents import Document
from langchain_core.stores import BaseStore

from gradmem_adapter import GradMemPipeline, MemoryState, MemoryStateError, MemoryStore, UnknownStateError, WriteOptions
from gradmem_adapter.store import Entry

from .references import check_references

T = TypeVar("T")
_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,64}")


class MemoryStateStore(BaseStore[str, MemoryState]):
    """Memory states, content-addressed: the same text under the same model and options is written once.

    Args:
        store (`MemoryStore`, `str` or `PathLike`, *optional*): a memory store for the states, or its directory. None: a
            temporary directory that is deleted with the process.
        namespace (`str`, *optional*): a tenant's name, at most 64 letters, digits, `_` and `-`. Its states are kept in
            a directory of their own, which stores of other namespaces do not see. None: what `store` itself holds.

    Raises:
        ValueError: the namespace has other characters.
    """

    def __init__(
        self, store: MemoryStore | str | os.PathLike[str] | None = None, *, namespace: str | None = None
    ) -> None:
        if store is None:
            store = _temporary_directory() / uuid.uuid4().hex
        if not isinstance(store, MemoryStore):
            store = MemoryStore(store)
        if namespace is not None:
            if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
                raise ValueError(f"A namespace must be 1 to 64 letters, digits, _ and -, got {namespace!r}.")
            path = store.path / "namespaces" / namespace
            store = MemoryStore(path, dtype=store.dtype, keep_text=store.keep_text)
        self.store = store
        self.writes = 0
        """How many contexts this object has written; those found in the store do not count."""
        self._counting = threading.Lock()

    def __reduce__(self) -> tuple[type[MemoryStateStore], tuple[MemoryStore]]:
        return MemoryStateStore, (self.store,)  # copies share the directory, but not the count

    def mget(self, keys: Sequence[str]) -> list[MemoryState | None]:
        """The states: None for a missing one, and for a damaged one, which a warning names and `write` replaces.

        Args:
            keys (`Sequence[str]`): references.

        Raises:
            ValueError: a key is not a reference.
        """
        return [self._find(reference) for reference in check_references(list(keys))]

    def _find(self, reference: str) -> MemoryState | None:
        try:
            return self.store.get(reference)
        except UnknownStateError:
            return None
        except MemoryStateError as error:
            warnings.warn(f"{error} It counts as missing.", stacklevel=4)
            return None

    def mset(self, key_value_pairs: Sequence[tuple[str, MemoryState]]) -> None:
        """Store states, without further rounding.

        Args:
            key_value_pairs (`Sequence[tuple[str, MemoryState]]`): references and their states; any iterable will do.

        Raises:
            ValueError: a key is not a reference; nothing is stored then.
        """
        pairs = list(key_value_pairs)  # a zip can be read only once
        check_references([reference for reference, _ in pairs])
        for reference, state in pairs:
            self.store.put(state, [Entry(reference)])

    def mdelete(self, keys: Sequence[str]) -> None:
        """Delete states.

        Args:
            keys (`Sequence[str]`): references; those not in the store are ignored.

        Raises:
            ValueError: a key is not a reference; nothing is deleted then.
        """
        self.store.delete(check_references(list(keys)))

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """The references of all states.

        Args:
            prefix (`str`, *optional*): only references that begin with this.
        """
        yield from (key for key in self.store if key.startswith(prefix or ""))

    def get(self, reference: str, *, fingerprint: str | None = None) -> MemoryState:
        """The state of a reference.

        Args:
            reference (`str`): 32 hexadecimal digits.
            fingerprint (`str`, *optional*): that of the model that is to read it; None: allow any model's state.

        Raises:
            ValueError: it is not a reference.
            UnknownStateError: this store does not hold it: it was deleted, belongs to another tenant, or was made up.
            MemoryStateError: it is damaged, is not what was stored, or was written by another model than `fingerprint`.
        """
        return self.store.get(check_references(reference), fingerprint)

    def reference(self, pipeline: GradMemPipeline, text: str, options: WriteOptions | None = None) -> str:
        """What `write` would return for a text. It depends on the model, the way of writing and the text.

        Args:
            pipeline (`GradMemPipeline`): what would write.
            text (`str`): one text.
            options (`WriteOptions`, *optional*): how to write; None: as the adapter's configuration says.
        """
        return self.store.key(pipeline, _no_document(text), options)

    def references(self, pipeline: GradMemPipeline, texts: list[str], options: WriteOptions | None = None) -> list[str]:
        """What `write` would return for texts; see `reference`."""
        return self.store.keys_of(pipeline, _no_document(texts), options)

    def write(
        self,
        pipeline: GradMemPipeline,
        texts: str | Sequence[str],
        options: WriteOptions | None = None,
        *,
        sources: Sequence[str | None] | None = None,
        progress: bool | None = False,
    ) -> list[str]:
        """Return the references of texts; those missing or damaged are first written, in batches that fit into memory.

        Each batch is stored as soon as it is written, so that a later failure loses nothing. Threads that write the
        same text at the same time write it once.

        Args:
            pipeline (`GradMemPipeline`): what writes.
            texts (`str` or `Sequence[str]`): one text or any number, each short enough for one state. For longer ones,
                see `write_document`.
            options (`WriteOptions`, *optional*): how to write; None: as the adapter's configuration says.
            sources (`Sequence[str]`, *optional*): where each text comes from, for `MemoryStore.forget` and citations.
            progress (`bool`, *optional*, defaults to `False`): show a progress bar; None: if stderr is a terminal.

        Returns:
            `list[str]`: a reference for each text, in order.

        Raises:
            TypeError: something is not a text, such as a `Document`.
            ValueError: a text cannot be written.
        """
        return self.store.add(
            pipeline, _no_document(texts), sources=sources, options=options, progress=progress, done=self._count
        )

    def write_document(
        self,
        pipeline: GradMemPipeline,
        text: str | Iterable[str],
        options: WriteOptions | None = None,
        *,
        source: str | None = None,
        segment_tokens: int | None = None,
        progress: bool | None = False,
    ) -> list[str]:
        """The references of a long text's segments, in order; see `MemoryStore.add_document`.

        Args:
            pipeline (`GradMemPipeline`): what writes.
            text (`str` or `Iterable[str]`): a text of any length, or its consecutive pieces, such as the lines of an
                open file.
            options, progress: as for `write`.
            source (`str`, *optional*): where the text comes from.
            segment_tokens (`int`, *optional*): the most tokens in a segment; None: as for `pipeline.segments`.

        Raises:
            TypeError, ValueError: the text cannot be written, or is the name of a file.
        """
        return self.store.add_document(
            pipeline, _no_document(text), source=source, segment_tokens=segment_tokens, options=options,
            progress=progress, done=self._count,
        )  # fmt: skip

    def _count(self, keys: list[str]) -> None:
        with self._counting:
            self.writes += len(keys)

    def gc(self, keep: Iterable[str]) -> int:
        """Delete all states but those still in use. A text whose state is deleted is written again when needed.

        Args:
            keep (`Iterable[str]`): references in use: `GradMemChatMessageHistory.references`,
                `references_of(document)` of documents, ...

        Returns:
            `int`: how many were deleted.

        Raises:
            ValueError: something to keep is not a reference; nothing is deleted then.
        """
        return len(self.store.gc(check_references(list(keep))))


def _no_document(texts: T) -> T:
    """The texts, unchanged; `TypeError` for documents, whose fields would be taken for texts."""
    among = texts if isinstance(texts, list | tuple) else [texts]
    if any(isinstance(one, Document) for one in among):
        raise TypeError(
            "Expected texts, got a Document: pass document.page_content. For documents of any length, use "
            "GradMemCompressor.from_chat(chat).transform_documents(documents), which returns documents with references "
            "for attach_documents."
        )
    return texts


@functools.cache
def _temporary_directory() -> Path:
    """A directory that this process deletes when it ends. Forked processes share it and do not delete it."""
    path, maker = Path(tempfile.mkdtemp(prefix="gradmem-")), os.getpid()

    def remove() -> None:
        if os.getpid() == maker:
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    return path
