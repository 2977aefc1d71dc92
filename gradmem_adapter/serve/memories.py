"""The memories of tenants: each tenant has a memory store, and each source in it is a memory."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gradmem_adapter.documents import DocumentMemory
from gradmem_adapter.outputs import WriteProgress
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.prompts import Prompt
from gradmem_adapter.segments import unknown_length
from gradmem_adapter.serve.errors import ApiError, changing_a_store
from gradmem_adapter.serve.metrics import Metrics
from gradmem_adapter.serve.schemas import AUTO
from gradmem_adapter.serve.stores import store_of
from gradmem_adapter.serve.streams import Tell
from gradmem_adapter.state import MemoryState
from gradmem_adapter.store import Entry, MemoryStore, search_scores
from gradmem_adapter.store.landing import add_places
from gradmem_adapter.store.whole import whole_documents
from gradmem_adapter.utils.kv_cache import kv_cache_bytes
from gradmem_adapter.utils.wording import counted
from gradmem_adapter.write.options import WriteOptions

_PREFIX = "mem_"
_ASKED_IN_TURN = 64
"""The most states to ask one by one if none of their texts shares a word with the question: each costs a pass."""
_MEASURED_AT_ONCE = 8
"""Segments whose fidelity is measured together. The work can only be cancelled between such batches."""


class Found(NamedTuple):
    """What a question is answered from.

    Args:
        memory (`MemoryState`): the state of one text, or of several side by side.
        entries (`Sequence[Entry]`): where these texts come from.
        support (`float`, *optional*): how far memory holds an answer, from 0 to 1; None: not requested, or the adapter
            was not trained to refuse.
    """

    memory: MemoryState
    entries: Sequence[Entry]
    support: float | None = None


class Memories:
    """The memories of tenants. They are kept only in the tenants' stores, so that a killed server loses nothing.

    A memory is what a store has of one source: of a text sent by HTTP, or of a file that `gradmem write` wrote.

    Args:
        pipeline (`GradMemPipeline`): what writes and reads.
        folder (`Path`): the folder of the stores, as for `store_of`.
        metrics (`Metrics`): counts the states that are written.
        segment_tokens (`int`, *optional*): the most tokens in a segment; None: as for `pipeline.segments`.
    """

    def __init__(
        self, pipeline: GradMemPipeline, folder: Path, metrics: Metrics, segment_tokens: int | None = None
    ) -> None:
        self.pipeline, self.folder, self.metrics, self.segment_tokens = pipeline, folder, metrics, segment_tokens
        self._stores: dict[str, MemoryStore] = {}

    @cached_property
    def _kv_bytes_per_token(self) -> int:
        """Bytes per token of the KV cache that the backbone would need to read a text itself."""
        backbone = self.pipeline.model.get_base_model()
        one, two = (kv_cache_bytes(backbone, torch.zeros(1, n, dtype=torch.long)) for n in (1, 2))
        return two - one

    def _store(self, tenant: str) -> MemoryStore:
        return self._stores.setdefault(tenant, store_of(self.folder, tenant))

    def check_cuts(self) -> None:
        """Raise `ApiError` unless the length of a segment is known. Only writing needs it."""
        if self.segment_tokens is None and self.pipeline.model.active_peft_config.segment_tokens is None:
            remedy = (
                "this server writes no texts; stored memories can be asked. Its operator can set the length with "
                "gradmem serve --segment-tokens."
            )
            raise ApiError(503, unknown_length(remedy), "no_segment_tokens")

    def id_of(self, tenant: str, text: str, options: WriteOptions) -> str:
        """The id of a text's memory, written or not. The same text cut the same way has the same id."""
        cut = "" if self.segment_tokens is None else f"_{self.segment_tokens}"
        return _PREFIX + self._store(tenant).key(self.pipeline, text, options) + cut

    def write(
        self,
        tenant: str,
        text: str,
        name: str | None,
        options: WriteOptions,
        fidelity: bool,
        check: Callable[[], None],
        tell: Tell | None = None,
    ) -> dict[str, Any]:
        """WRITE a text in segments, unless it is stored already, and describe its memory.

        Args:
            tenant, text (`str`): the tenant and the text.
            name (`str`, *optional*): a name for the text.
            options (`WriteOptions`): how to write.
            fidelity (`bool`): also measure the fidelity.
            check (`Callable`): called between batches of segments and between steps; its exceptions end the work.
            tell (`Callable`, *optional*): called with an event about the segments, and with one for each write step.
        """
        store, identity = self._store(tenant), self.id_of(tenant, text, options)
        segments = tuple(self.pipeline.segments([text], self.segment_tokens))  # a list: a string might name a file
        if not segments:
            raise ValueError("The text is only white space: there is nothing to write.")
        about: dict[str, Any] = {"name": name, "segments": len(segments), "created": int(time.time())}
        there = _whole(store.entries(identity), self.pipeline.model.fingerprint())
        places = [dict(entry.metadata) for entry in there] or [about] * len(segments)

        def written(keys: list[str]) -> None:
            self.metrics.written.inc(len(keys))
            check()

        def stepped(numbers: list[int], progress: WriteProgress) -> None:
            check()
            if tell is not None:
                tell(_step(numbers, progress))

        add = partial(
            store.add,
            self.pipeline,
            [segment.text for segment in segments],
            sources=identity,
            offsets=[(segment.start, segment.end) for segment in segments],
            options=options,
            done=written,
            callback=stepped,
        )
        if tell is not None:
            cut = [{"start": one.start, "end": one.end, "tokens": one.tokens} for one in segments]
            tell({"object": "memory.begun", "id": identity, "segments": cut})
        with changing_a_store():
            store.check_writable()  # fail before the work
            keys = add(metadata=places)
        if fidelity and "fidelity" not in places[0]:
            shares = self._fidelity(DocumentMemory(segments, store.get(keys), "parallel"), check)
            with changing_a_store():
                add(metadata=[place | {"fidelity": share} for place, share in zip(places, shares, strict=True)])
        return self.describe(tenant, identity)

    def rename(self, tenant: str, identity: str, name: str) -> dict[str, Any]:
        """Rename a memory and describe it; `ApiError` if the tenant has none with this id."""
        entries = [
            replace(entry, metadata={**entry.metadata, "name": name}) for entry in self._entries(tenant, identity)
        ]
        with changing_a_store():
            add_places(self._store(tenant).index, entries)
        return self.describe(tenant, identity)

    def _fidelity(self, memory: DocumentMemory, check: Callable[[], None]) -> list[float]:
        """The fidelity of each segment."""
        shares: list[float] = []
        for begin in range(0, len(memory.segments), _MEASURED_AT_ONCE):
            check()
            part = slice(begin, begin + _MEASURED_AT_ONCE)
            measured = DocumentMemory(memory.segments[part], memory.states[part], "parallel").fidelity(self.pipeline)
            shares += measured.greedy.tolist()
        return shares

    def describe(self, tenant: str, identity: str, text: bool = False) -> dict[str, Any]:
        """Describe a memory, with its text if asked for; `ApiError` if the tenant has none with this id."""
        entries = self._entries(tenant, identity)
        states = self._states(tenant, entries)
        losses = states.write_losses.tolist()
        pieces = [
            {
                "start": entry.start,
                "end": entry.end,
                "tokens": entry.tokens,
                "write_losses": losses[i],
                "fidelity": entry.metadata.get("fidelity"),
            }
            | ({"text": entry.text} if text else {})
            for i, entry in enumerate(entries)
        ]
        return self._summary(entries) | {"write_loss": sum(row[-1] for row in losses) / len(losses), "segments": pieces}

    def segment(self, tenant: str, identity: str, index: int) -> tuple[str | None, MemoryState]:
        """A segment's text, if the store keeps it, and its state; `ApiError` if there is no such segment."""
        entries = self._entries(tenant, identity)
        if index >= len(entries):
            told = f"This memory has {len(entries)} segment{'s' * (len(entries) > 1)}, counted from 0."
            raise ApiError(400, told, param="segment")
        return entries[index].text, self._states(tenant, [entries[index]])

    def page(self, tenant: str, limit: int, after: str | None) -> tuple[list[dict[str, Any]], bool]:
        """Some of a tenant's memories in the order of their ids, and whether there are more."""
        named = (entry for entry in self._store(tenant).entries() if entry.source and entry.source > (after or ""))
        model = self.pipeline.model.fingerprint()
        whole = filter(None, (_whole(group, model) for _, group in itertools.groupby(named, lambda one: one.source)))
        found = [self._summary(entries) for entries in itertools.islice(whole, limit + 1)]
        return found[:limit], len(found) > limit

    def delete(self, tenant: str, identity: str) -> None:
        """Remove a memory of any model, from the disk as well; `ApiError` if the tenant has none with this id, or if it
        cannot be removed."""
        if not any(self._store(tenant).entries(identity)):
            raise _unknown(identity)
        with changing_a_store():
            self._store(tenant).forget(identity)

    def find(
        self, tenant: str, memory: Sequence[str] | str, prompt: Prompt, query: str, most: int, support: bool = False
    ) -> Found | None:
        """The memory to answer a question from; None: the store has no text for it.

        If there are more states than may be read, those whose texts share words with the question are chosen. An
        adapter that was trained to refuse asks each chosen state and answers from the one that holds an answer; others
        read them all side by side. If no text of the given memories shares a word, an adapter that refuses asks all
        states, up to a limit; otherwise, and beyond that limit, `ApiError` is raised.

        Args:
            tenant (`str`): the tenant.
            memory (`Sequence[str]` or `str`): ids, or `"auto"` for all memories of the tenant.
            prompt (`Prompt`): the whole prompt.
            query (`str`): the question in it.
            most (`int`): the most states to read.
            support (`bool`, *optional*, defaults to `False`): also say how far memory holds an answer.
        """
        store, model = self._store(tenant), self.pipeline.model.fingerprint()
        if memory == AUTO:
            entries = [one.entry for one in store.choose(self.pipeline, query, most, whole=True)]
        else:
            entries = [entry for identity in dict.fromkeys(memory) for entry in self._entries(tenant, identity, model)]
            if len(entries) > most:
                own = {entry.key: entry for entry in reversed(entries)}
                chosen = store.choose(self.pipeline, query, most, keys=own)
                if not chosen and not (self.pipeline.refuses and len(own) <= _ASKED_IN_TURN):
                    raise _no_word(len(own), most)
                entries = [own[one.entry.key] for one in chosen] or list(own.values())[::-1]
        if not entries:
            return None
        groups = [entries[begin : begin + most] for begin in range(0, len(entries), most)]
        support = support or len(groups) > 1
        found = [self._select(store, model, prompt, query, group, support) for group in groups]
        return max(found, key=lambda one: one.support or 0.0)

    def _select(
        self, store: MemoryStore, model: str, prompt: Prompt, query: str, entries: Sequence[Entry], support: bool
    ) -> Found:
        """Which of some states to answer a question from."""
        keys = [entry.key for entry in entries]
        by_words = partial(search_scores, store.index, model, query, keys)
        read = self.pipeline.select(prompt, memory=store.get(keys, model), search_scores=by_words, support=support)
        return Found(read.memory, [entries[i] for i in read.states], read.support)

    def _states(self, tenant: str, entries: Sequence[Entry]) -> MemoryState:
        return self._store(tenant).get([entry.key for entry in entries], self.pipeline.model.fingerprint())

    def _entries(self, tenant: str, identity: str, model: str | None = None) -> list[Entry]:
        entries = _whole(self._store(tenant).entries(identity), model or self.pipeline.model.fingerprint())
        if not entries:
            raise _unknown(identity)
        return entries

    def _summary(self, entries: Sequence[Entry]) -> dict[str, Any]:
        shares = [entry.metadata.get("fidelity") for entry in entries]
        measured = [(share, entry.tokens) for share, entry in zip(shares, entries, strict=True) if share is not None]
        first = entries[0]
        return {
            "id": first.source,
            "object": "memory",
            "created": first.metadata.get("created", int(first.written)),
            "name": first.metadata.get("name"),
            "text_tokens": sum(entry.tokens for entry in entries),
            "vectors": len(entries) * self.pipeline.model.active_peft_config.num_memory_tokens,
            "bytes": sum({entry.key: entry.nbytes for entry in entries}.values()),
            "kv_bytes": self._kv_bytes_per_token * sum(entry.tokens for entry in entries),
            "fidelity": sum(s * n for s, n in measured) / sum(n for _, n in measured) if measured else None,
        }


def _whole(entries: Iterable[Entry], model: str) -> list[Entry]:
    """The segments of a source's text that a model wrote to its end; of several such texts, the one written last.

    Args:
        entries (`Iterable[Entry]`): entries of the source.
        model (`str`): the model's fingerprint. Computing it reads the weights: do so once per request, not per memory.
    """
    return list(whole_documents(entry for entry in entries if entry.fingerprint == model).values() or [[]])[-1]


def _step(numbers: Sequence[int], progress: WriteProgress) -> dict[str, Any]:
    """The event for a write step of segments that are written together."""
    shares = zip(numbers, progress.losses.tolist(), progress.recovered.tolist(), strict=True)
    segments = [
        {"segment": i, "write_loss": loss if math.isfinite(loss) else None, "recovered": share}
        for i, loss, share in shares
    ]
    return {"object": "memory.step", "step": progress.step, "steps": progress.steps, "segments": segments}


def _unknown(identity: str) -> ApiError:
    told = f"This model has no memory {identity[:80]!r}. GET /v1/memories lists its memories."
    return ApiError(404, told, "memory_not_found", param="memory")


def _no_word(states: int, most: int) -> ApiError:
    told = (
        f"These memories have {counted(states, 'state')}, but an answer is read from at most {most:,}, and none of the "
        "texts shares a word with the question. Use a word of the text in the question, or name fewer memories."
    )
    return ApiError(400, told, "no_memory_chosen", param="memory")


def places_of(found: Found | None) -> Iterator[dict[str, Any]]:
    """The places that an answer comes from, as they are sent to clients."""
    for entry in [] if found is None else found.entries:
        yield {"id": entry.source, "name": entry.metadata.get("name"), "start": entry.start, "end": entry.end}
