"""Whether a document is stored completely when its source was written more than once."""

import pytest
from tiny import tiny_text

from gradmem_adapter.store import Entry, MemoryStoreError, index
from gradmem_adapter.store.whole import of_segments, whole_documents

SENTENCES = [f"{tiny_text(9, seed)}." for seed in range(4)]
TEXT, EDITED = " ".join(SENTENCES[:3]), " ".join([*SENTENCES[:2], SENTENCES[3]])
HOW = {"source": "notes.txt", "segment_tokens": 12}


def add_some(store, pipeline, text, which, **how):
    """Segments of a text, as an interrupted `add_document` leaves them."""
    segments = list(pipeline.segments(text, 12))
    metadata = [of_segments(segments)] * len(which)
    some = [segments[i] for i in which]
    offsets = [(one.start, one.end) for one in some]
    store.add(pipeline, [one.text for one in some], sources="notes.txt", offsets=offsets, metadata=metadata, **how)


def whole_texts(store):
    return [[entry.text for entry in group] for group in whole_documents(store.entries()).values()]


def test_halves_written_with_different_options_are_not_whole(store, pipeline):
    add_some(store, pipeline, TEXT, [0, 1], steps=1)
    add_some(store, pipeline, TEXT, [0], steps=2)
    assert not any(map(store.is_whole, store.entries()))
    store.add_document(pipeline, TEXT, steps=2, **HOW)
    assert [store.is_whole(entry) for entry in store.entries()].count(True) == 3
    assert whole_texts(store) == [SENTENCES[:3]]


def test_halves_of_two_texts_are_not_whole(store, pipeline):
    add_some(store, pipeline, TEXT, [0, 1])
    add_some(store, pipeline, EDITED, [2])
    assert not any(map(store.is_whole, store.entries()))
    assert whole_texts(store) == []


@pytest.mark.parametrize("known", [True, False])
def test_an_edited_text_includes_the_segments_it_shares(store, pipeline, known):
    """Also if segments do not say which text they belong to: at each place the last one counts."""
    for text in (TEXT, EDITED):
        if known:
            store.add_document(pipeline, text, **HOW)
        else:
            segments = list(pipeline.segments(text, 12))
            store.add(
                pipeline,
                [one.text for one in segments],
                sources="notes.txt",
                offsets=[(i, i + 1) for i in range(3)],
                metadata=[{"segments": 3}] * 3,
            )
    assert whole_texts(store) == [[*SENTENCES[:2], SENTENCES[3]]]


def test_whole_texts_of_one_source_stay_separate_and_in_order(store, pipeline):
    other = " ".join(reversed(SENTENCES))
    for text in (TEXT, other):
        store.add_document(pipeline, text, **HOW)
    store.add_document(pipeline, TEXT, steps=1, **HOW)
    assert whole_texts(store) == [SENTENCES[:3], SENTENCES[::-1], SENTENCES[:3]]
    assert all(map(store.is_whole, store.entries()))


def test_the_callers_metadata_does_not_mix_two_documents(store, pipeline):
    for text in (TEXT, " ".join(reversed(SENTENCES[:3]))):
        store.add_document(pipeline, text, metadata={"document": "notes", "title": "Notes"}, **HOW)
    assert whole_texts(store) == [SENTENCES[:3], SENTENCES[2::-1]]


def test_is_whole_counts_segments_without_reading_texts(store, pipeline, monkeypatch):
    store.add_document(pipeline, TEXT, **HOW)
    add_some(store, pipeline, EDITED, [2])
    entries, made = list(store.entries()), []
    monkeypatch.setattr(index, "Entry", lambda *fields: made.append(fields) or Entry(*fields))
    assert [store.is_whole(entry) for entry in entries[:2]] == [True, True]
    assert len(made) == 2 * 2  # one for each document, and no text
    assert not any(SENTENCES[0] in fields for fields in made)
    with store.index.writing() as connection:
        connection.execute("UPDATE places SET metadata = '{' WHERE key = ?", (entries[1].key,))
    with pytest.raises(MemoryStoreError, match=r"its row for .* is invalid"):
        store.is_whole(entries[0])


def test_segments_without_places_are_distinguished_by_their_keys():
    parts = [Entry(key=key, source="a", metadata={"segments": 2}) for key in ("1", "2")]
    assert list(whole_documents(parts).values()) == [parts]
    assert not whole_documents(parts[:1])


def test_entries_that_are_not_segments_are_kept_as_they_are():
    notes = [Entry(key=key, source="a") for key in ("1", "2")]
    alone = [Entry(key="3", metadata={"segments": 9})]
    assert list(whole_documents([*notes, *alone]).values()) == [notes, alone]
