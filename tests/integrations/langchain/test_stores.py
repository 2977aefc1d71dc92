"""MemoryStateStore: states by reference, each text written once, and what it refuses."""

import copy
import hashlib
import json
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_gradmem import AtomicFileStore, MemoryStateStore
from langchain_gradmem.writer import MemoryWriter
from tiny import tiny_text
from tiny_pipeline import tiny_pipeline

from gradmem_adapter import MemoryStateError, WriteOptions
from gradmem_adapter.utils import hardware

TEXTS = [tiny_text(12, seed=i) for i in range(4)]
REFERENCE = "0123456789abcdef" * 2


@pytest.fixture
def state(pipeline):
    return pipeline.write(TEXTS[0])


def test_damaged_states_raise(state):
    store = MemoryStateStore()
    store.mset([(REFERENCE, state)])
    (key,) = store.store.yield_keys()
    store.store.mset([(key, store.store.mget([key])[0][:-7])])
    with pytest.raises(MemoryStateError, match=f"{REFERENCE}' cannot be read"):
        store.get(REFERENCE)
    with pytest.warns(UserWarning, match="counts as missing"):
        assert store.mget([REFERENCE]) == [None]


@pytest.mark.parametrize("namespace", ["", "a/b", "../x", "a b"])
def test_namespaces_that_could_reach_another_are_refused(namespace):
    with pytest.raises(ValueError, match="namespace"):
        MemoryStateStore(namespace=namespace)


def test_a_copy_does_not_wait_for_what_the_original_writes(pipeline, tmp_path, monkeypatch):
    store = MemoryStateStore(AtomicFileStore(tmp_path), namespace="a")
    copies = []
    write = pipeline.write_many

    def copy_meanwhile(*args, **kwargs):
        copies.extend((copy.deepcopy(store), pickle.loads(pickle.dumps(store))))
        write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_many", copy_meanwhile)
        references = store.write(pipeline, TEXTS[0])
    for same in copies:
        assert same.write(pipeline, TEXTS[0]) == references
        assert (same.namespace, same.writes) == ("a", 0), "found in the directory that they share"


class TestWrite:
    def test_the_same_text_is_written_once(self, pipeline):
        store = MemoryStateStore()
        first = store.write(pipeline, [TEXTS[0], TEXTS[1], TEXTS[0]])
        assert first[0] == first[2] != first[1]
        assert store.writes == 2
        assert store.write(pipeline, [TEXTS[1], TEXTS[2]])[0] == first[1]
        assert store.writes == 3
        assert store.reference(pipeline, TEXTS[1]) == first[1]

    def test_one_text_is_one_state(self, pipeline):
        store = MemoryStateStore()
        assert store.write(pipeline, TEXTS[0]) == store.write(pipeline, [TEXTS[0]])
        assert MemoryWriter(pipeline=pipeline, store=store).write_texts(TEXTS[0]) == store.write(pipeline, TEXTS[0])
        assert store.writes == 1

    def test_options_and_model_are_part_of_the_identity(self, pipeline):
        store = MemoryStateStore()
        references = {
            store.write(pipeline, TEXTS[:1])[0],
            store.write(pipeline, TEXTS[:1], WriteOptions(steps=3))[0],
            store.write(tiny_pipeline(seed=4), TEXTS[:1])[0],
        }
        assert len(references) == 3

    def test_fields_at_their_defaults_change_no_reference(self, pipeline):
        """So that stored states are found again when WRITE has a new option."""
        store = MemoryStateStore()
        identity = [store.namespace, pipeline.model.fingerprint(), [("lr", 0.1), ("steps", 3)], TEXTS[0]]
        expected = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
        assert store.reference(pipeline, TEXTS[0], WriteOptions(steps=3, lr=0.1)) == expected
        assert store.reference(pipeline, TEXTS[0]) == store.reference(pipeline, TEXTS[0], WriteOptions())

    def test_what_is_stored_is_what_write_gives(self, pipeline):
        store = MemoryStateStore()
        (reference,) = store.write(pipeline, TEXTS[:1])
        assert store.get(reference) == pipeline.write(TEXTS[0]).cpu()

    def test_a_directory_outlives_the_store(self, pipeline, tmp_path):
        (reference,) = MemoryStateStore(AtomicFileStore(tmp_path)).write(pipeline, TEXTS[:1])
        again = MemoryStateStore(AtomicFileStore(tmp_path))
        assert again.write(pipeline, TEXTS[:1]) == [reference]
        assert again.writes == 0

    def test_a_text_that_cannot_be_written_stores_nothing(self, pipeline):
        store = MemoryStateStore()
        with pytest.raises(ValueError, match="tokens"):
            store.write(pipeline, [TEXTS[0], tiny_text(500)])
        assert list(store.yield_keys()) == []

    def test_batches_are_stored_as_they_are_written(self, pipeline, monkeypatch):
        store, found = MemoryStateStore(), []
        monkeypatch.setattr(hardware, "SATURATED", {"cpu": 24})
        write = pipeline.model.base_model.write
        monkeypatch.setattr(
            pipeline.model.base_model,
            "write",
            lambda *a, **k: found.append(len(list(store.yield_keys()))) or write(*a, **k),
        )
        store.write(pipeline, TEXTS)
        assert found == [0, 2]

    def test_a_text_that_many_ask_for_at_once_is_written_once(self, pipeline, monkeypatch):
        """The others wait for it; where its write fails, they write it themselves."""
        store, all_in = MemoryStateStore(), threading.Barrier(8)
        write_many, calls = pipeline.write_many, []

        def slow(texts, **options):
            calls.append(list(texts))
            if len(calls) == 1:
                time.sleep(0.2)
                raise RuntimeError("once")
            return write_many(texts, **options)

        def ask(i):
            all_in.wait()
            return store.write(pipeline, [TEXTS[i % 2], TEXTS[2]])

        monkeypatch.setattr(pipeline, "write_many", slow)
        with ThreadPoolExecutor(8) as threads:
            futures = [threads.submit(ask, i) for i in range(8)]
            errors = [future.exception() for future in futures]
        assert sum(error is not None for error in errors) == 1
        assert store.writes == 3
        assert store._claims == {}
        expected = [store.reference(pipeline, text) for text in TEXTS]
        for i, future in enumerate(futures):
            assert errors[i] or future.result() == [expected[i % 2], expected[2]]


def test_garbage_of_other_namespaces_stays(pipeline):
    mine = MemoryStateStore()
    other = MemoryStateStore(mine.store, namespace="other")
    keep, gone = mine.write(pipeline, TEXTS[:2])
    other.write(pipeline, TEXTS[:1])
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        mine.gc(["x"])
    assert mine.gc([keep]) == 1
    assert list(mine.yield_keys()) == [keep] != [gone]
    assert len(list(other.yield_keys())) == 1
