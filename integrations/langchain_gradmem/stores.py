"""Memory states by reference, over any store of bytes that LangChain has."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

from langchain_core.stores import BaseStore, ByteStore, InMemoryByteStore

from gradmem_adapter import GradMemPipeline, MemoryState, MemoryStateError, WriteOptions

from .references import REFERENCE, check_references

_MARK = b"gradmem "
"""What a stored state begins with, followed by its key: the state alone does not say which text it is of."""
_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,64}")


class UnknownReferenceError(KeyError):
    """A reference that the store does not hold: of another tenant, deleted, or made up."""

    def __str__(self) -> str:
        return str(self.args[0])


class MemoryStateStore(BaseStore[str, MemoryState]):
    """Memory states, content-addressed: the same text under the same model and options is written once.

    Args:
        store (`ByteStore`, *optional*, defaults to one in memory): where the bytes go, such as an `AtomicFileStore`,
            a directory.
        namespace (`str`, *optional*, defaults to `"default"`): of a tenant, at most 64 letters, digits, `_` and `-`.
            Stores of other namespaces do not see its states, nor do their references fit.

    Raises:
        ValueError: a namespace of other characters.
    """

    def __init__(self, store: ByteStore | None = None, *, namespace: str = "default") -> None:
        if not isinstance(namespace, str) or not _NAMESPACE.fullmatch(namespace):
            raise ValueError(f"A namespace is made of at most 64 letters, digits, _ and -, got {namespace!r}.")
        self.store = InMemoryByteStore() if store is None else store
        self._namespace = namespace
        self.writes = 0
        """How many contexts have been written, as opposed to found."""
        self._claims: dict[str, threading.Event] = {}
        """References that a thread is writing, and what it sets when it has."""
        self._claiming = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: not what threads are writing here."""
        return {"store": self.store, "_namespace": self.namespace, "writes": self.writes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_claims": {}, "_claiming": threading.Lock()}

    @property
    def namespace(self) -> str:
        """The tenant's."""
        return self._namespace

    def _keys(self, references: Sequence[str]) -> list[str]:
        """Where states are in the store of bytes: the one way there, which nothing but a reference can go.

        A store of files takes keys for paths; any other text could lead into another namespace.
        """
        return [f"{self.namespace}/{reference}" for reference in check_references(list(references))]

    def mget(self, keys: Sequence[str]) -> list[MemoryState | None]:
        """The states, None where there is none, and where it is damaged: a warning names it, and `write` replaces it.

        Args:
            keys (`Sequence[str]`): references.

        Raises:
            ValueError: a key that is no reference.
        """
        states: list[MemoryState | None] = []
        for found in self._read(keys):
            if isinstance(found, MemoryStateError):
                warnings.warn(f"{found} It counts as missing.", stacklevel=2)
            states.append(None if isinstance(found, MemoryStateError) else found)
        return states

    def _read(self, references: Sequence[str]) -> list[MemoryState | MemoryStateError | None]:
        """What is stored, or why it cannot be read."""
        keys = self._keys(references)
        return [self._decoded(key, data) for key, data in zip(keys, self.store.mget(keys), strict=True)]

    @staticmethod
    def _decoded(key: str, data: bytes | None) -> MemoryState | MemoryStateError | None:
        if data is None:
            return None
        name, _, rest = data.partition(b"\n") if data.startswith(_MARK) else (_MARK + key.encode(), b"", data)
        if name != _MARK + key.encode():  # copied or renamed in the store of bytes
            return MemoryStateError(f"What is stored as {key!r} is another state, {name[len(_MARK) :][:120]!r}.")
        try:
            return MemoryState.from_bytes(rest)
        except MemoryStateError as error:
            return MemoryStateError(f"The stored state {key!r} cannot be read: {error}")

    def mset(self, key_value_pairs: Sequence[tuple[str, MemoryState]]) -> None:
        """Put states in.

        Args:
            key_value_pairs (`Sequence[tuple[str, MemoryState]]`): references and their states.

        Raises:
            ValueError: a key that is no reference; nothing is stored then.
        """
        keys = self._keys([reference for reference, _ in key_value_pairs])
        states = [state.to_bytes() for _, state in key_value_pairs]
        self.store.mset([(key, _MARK + key.encode() + b"\n" + data) for key, data in zip(keys, states, strict=True)])

    def mdelete(self, keys: Sequence[str]) -> None:
        """Delete states.

        Args:
            keys (`Sequence[str]`): references; those that the store does not hold are passed over.

        Raises:
            ValueError: a key that is no reference; nothing is deleted then.
        """
        self.store.mdelete(self._keys(keys))

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """The references of this namespace.

        Args:
            prefix (`str`, *optional*): only those that begin so.
        """
        own = f"{self.namespace}/"
        for key in self.store.yield_keys(prefix=own):
            reference = key.removeprefix(own)
            if key.startswith(own) and REFERENCE.fullmatch(reference) and reference.startswith(prefix or ""):
                yield reference

    def get(self, reference: str, *, fingerprint: str | None = None) -> MemoryState:
        """The state of a reference.

        Args:
            reference (`str`): 32 hexadecimal digits.
            fingerprint (`str`, *optional*): of the model that is to read it; None: any model's state.

        Raises:
            ValueError: it is no reference.
            UnknownReferenceError: this store does not hold it.
            MemoryStateError: it is damaged or not what was stored there, or another model than `fingerprint` wrote it.
        """
        (state,) = self._read([reference])
        if isinstance(state, MemoryStateError):
            raise state
        if state is None:
            raise UnknownReferenceError(
                f"There is no memory state {reference!r} in namespace {self.namespace!r}. It was deleted, belongs to "
                "another tenant, or the store is another one than it was written to; write the text again."
            )
        if fingerprint is not None and state.fingerprint != fingerprint:
            raise MemoryStateError(
                f"Memory state {reference!r} was written by model {state.fingerprint}, and this is model "
                f"{fingerprint}: it would be read as noise. Write the text again with this model."
            )
        return state

    def reference(self, pipeline: GradMemPipeline, text: str, options: WriteOptions | None = None) -> str:
        """What `write` returns for a text, without writing: namespace, model, options and text decide it.

        Args:
            pipeline (`GradMemPipeline`): who would write.
            text (`str`): one text.
            options (`WriteOptions`, *optional*): how to write; None: as the adapter's configuration says.
        """
        identity = [self.namespace, pipeline.model.fingerprint(), _chosen(options or WriteOptions()), text]
        return hashlib.sha256(json.dumps(identity, default=vars).encode()).hexdigest()[:32]

    def write(
        self,
        pipeline: GradMemPipeline,
        texts: str | Sequence[str],
        options: WriteOptions | None = None,
        *,
        progress: bool | None = False,
    ) -> list[str]:
        """The references of texts; those not yet stored, or damaged, are written, in batches that fit into memory.

        Each batch is stored as soon as it is written, so that what fails later loses nothing. Threads that ask for one
        text at the same time write it once.

        Args:
            pipeline (`GradMemPipeline`): who writes.
            texts (`str` or `Sequence[str]`): one text, or any number, of lengths that the model takes.
            options (`WriteOptions`, *optional*): how to write; None: as the adapter's configuration says.
            progress (`bool`, *optional*, defaults to `False`): show a progress bar; None: where stderr is a terminal.

        Returns:
            `list[str]`: a reference for each text, in order.

        Raises:
            ValueError: a text cannot be written; none is written then.
        """
        texts = [texts] if isinstance(texts, str) else texts
        references = [self.reference(pipeline, text, options) for text in texts]
        waiting = dict(zip(references, texts, strict=True))
        while waiting:
            with self._claiming:
                others = {reference: self._claims[reference] for reference in waiting.keys() & self._claims.keys()}
                mine = {reference: text for reference, text in waiting.items() if reference not in others}
                done = threading.Event()
                self._claims |= dict.fromkeys(mine, done)
            try:
                self._write_missing(pipeline, mine, options, progress)
            finally:
                with self._claiming:
                    for reference in mine:
                        del self._claims[reference]
                done.set()
            for event in others.values():
                event.wait()
            waiting = {reference: waiting[reference] for reference in others}  # another's write may have failed
        return references

    def _write_missing(
        self, pipeline: GradMemPipeline, texts: dict[str, str], options: WriteOptions | None, progress: bool | None
    ) -> None:
        missing = [reference for reference, state in zip(texts, self.mget(list(texts)), strict=True) if state is None]

        def store(indices: list[int], states: MemoryState) -> None:
            self.mset([(missing[i], state) for i, state in zip(indices, states.cpu(), strict=True)])
            with self._claiming:
                self.writes += len(indices)

        if missing:
            pipeline.write_many([texts[r] for r in missing], progress=progress, done=store, options=options)

    def gc(self, keep: Iterable[str]) -> int:
        """Delete the namespace's states but those that are still in use. A text whose state is gone is written anew.

        Args:
            keep (`Iterable[str]`): references, of histories (`GradMemChatMessageHistory.references`), documents, ...

        Returns:
            `int`: how many were deleted.

        Raises:
            ValueError: what is to be kept is no reference; nothing is deleted then.
        """
        kept = set(check_references(list(keep)))
        gone = [reference for reference in self.yield_keys() if reference not in kept]
        self.mdelete(gone)
        return len(gone)


def _chosen(options: WriteOptions) -> list[tuple[str, Any]]:
    """The fields that are not at their defaults, by name: a new field changes no reference."""
    chosen = {field.name: getattr(options, field.name) for field in fields(options)}
    return sorted((name, value) for name, value in chosen.items() if value != getattr(WriteOptions(), name))
