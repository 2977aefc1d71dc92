"""Which segments belong to one document, and whether it is stored to its end: the one place with this rule."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from gradmem_adapter.segments import Segment
from gradmem_adapter.store.entry import Entry, Place
from gradmem_adapter.store.index import kinds_of
from gradmem_adapter.utils.kinds import check_kind


class Document(NamedTuple):
    """What all entries of one document have in common. A source can have several documents: its text was edited, cut
    differently, or written in another way.

    Args:
        source (`str`, *optional*): where it comes from.
        fingerprint, options (`str`): which model wrote it, and how.
        segments (`int`, *optional*): its number of segments; None: unknown, and what is stored counts as all of it.
        digest (`str`): a digest of its text and how it is cut, see `of_segments`; empty if `segments` is None.
    """

    source: str | None
    fingerprint: str
    options: str
    segments: int | None
    digest: str

    @classmethod
    def of(cls, entry: Entry) -> Document:
        """The document that an entry is a segment of."""
        options, segments = json.dumps(entry.options, sort_keys=True), entry.metadata.get("segments")
        if type(segments) is not int:
            return cls(entry.source, entry.fingerprint, options, None, "")
        digest = json.dumps(entry.metadata.get("segments_of"), sort_keys=True)
        return cls(entry.source, entry.fingerprint, options, segments, digest)


def of_segments(segments: Sequence[Segment], metadata: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """Metadata of a document's segments, which let `whole_documents` tell them from segments of other documents, and
    notice missing ones.

    Args:
        segments (`Sequence[Segment]`): all segments of the document.
        metadata (`Mapping`, *optional*): other metadata of each segment.
    """
    check_kind("metadata", metadata, Mapping | None, "a mapping")
    cut = json.dumps([(one.start, one.end, one.text) for one in segments])
    own = {"segments": len(segments), "segments_of": hashlib.sha256(cut.encode()).hexdigest()[:16]}
    return (own if len(segments) > 1 else {}) | dict(metadata or {})


def whole_documents(entries: Iterable[Entry]) -> dict[Document, list[Entry]]:
    """The documents that are stored to their ends, with the entries of each; the one written last comes last.

    Args:
        entries (`Iterable[Entry]`): all entries of some sources, in the order of their places.
    """
    groups: dict[Document, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(Document.of(entry), []).append(entry)
    whole = {}
    for document, group in groups.items():
        if document.segments is not None and document.source is not None:
            last = {_where(entry.key, entry.place): entry for entry in sorted(group, key=_written)}
            group = [entry for entry in group if last[_where(entry.key, entry.place)] is entry]
            if len(group) != document.segments:
                continue
        whole[document] = group
    return dict(sorted(whole.items(), key=lambda one: max(map(_written, one[1]))))


def whole_in(connection: sqlite3.Connection) -> Callable[[Entry], bool]:
    """A function that tells whether the document of an entry is stored to its end, by the rule of `whole_documents`. It
    reads each source once."""

    @cache
    def documents(source: str) -> Collection[Document]:
        found: dict[Document, set[object]] = {}
        for key, place, document in kinds_of(connection, source, Document.of):
            found.setdefault(document, set()).add(_where(key, place))
        return {document for document, places in found.items() if len(places) == document.segments}

    def is_whole(entry: Entry) -> bool:
        document = Document.of(entry)
        return document.source is None or document.segments is None or document in documents(document.source)

    return is_whole


def _where(key: str, place: Place) -> object:
    """What tells the segments of a document apart."""
    return key if place[1] is None else place


def _written(entry: Entry) -> float:
    return entry.written
