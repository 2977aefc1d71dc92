"""MemoryStateStore: states by reference, each text written once, and what it refuses."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from langchain_core.documents import Document
from langchain_gradmem import MemoryStateStore
from langchain_gradmem.writer import MemoryWriter
from tiny import tiny_text
from tiny_pipeline import tiny_pipeline

from gradmem_adapter import MemoryStateError, MemoryStore, WriteOptions
from gradmem_adapter.utils import hardware

TEXTS = [tiny_text(12, seed=i) for i in range(4)]
REFERENCE = "0123456789abcdef" * 2


@pytest.fixture
def state(pipeline):
    return pipeline.write(TEXTS[0])


def test_damaged_states_raise(state):
    store = MemoryStateStore()
    store.mset([(REFERENCE, state)])
    (file,) = store.store.path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(MemoryStateError, match=f"{REFERENCE}' cannot be read"):
        store.get(REFERENCE)
    with pytest.warns(UserWarning, match="counts as missing"):
        assert store.mget([REFERENCE]) == [None]


def test_states_put_back_are_found_and_forgotten_as_before(pipeline, tmp_path):
    store = MemoryStateStore(tmp_path)
    references = store.write(pipeline, TEXTS[:2], sources=["a", "b"])
    sizes = [file.stat().st_size for file in sorted(tmp_path.rglob("*.safetensors"))]
    store.mset(list(zip(references, store.mget(references), strict=True)))
    assert [file.stat().st_size for file in sorted(tmp_path.rglob("*.safetensors"))] == sizes
    assert {entry.text for entry in store.store.entries()} == set(TEXTS[:2])
    assert len(store.store.choose(pipeline, TEXTS[0])) == 2
    assert store.store.forget("a") == 1


def test_states_are_stored_from_any_iterable(state):
    """As by LangChain's other stores: the pairs of a zip can be read only once."""
    store = MemoryStateStore()
    store.mset(zip([REFERENCE], [state], strict=True))
    assert store.mget([REFERENCE]) == [state]


@pytest.mark.parametrize("namespace", ["", "a/b", "../x", "a b"])
def test_namespaces_that_could_reach_another_are_refused(namespace):
    with pytest.raises(ValueError, match="namespace"):
        MemoryStateStore(namespace=namespace)


def test_copies_share_the_states(pipeline, tmp_path):
    store = MemoryStateStore(tmp_path, namespace="a")
    references = store.write(pipeline, TEXTS)
    for same in (copy.deepcopy(store), pickle.loads(pickle.dumps(store)), MemoryStateStore(tmp_path, namespace="a")):
        assert same.write(pipeline, TEXTS) == references
        assert same.writes == 0


def test_a_temporary_directory_is_removed_with_its_process(tmp_path):
    script = "from langchain_gradmem import MemoryStateStore as S; s = S(); s.store.index.make(); print(s.store.path)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not Path(ran.stdout.strip()).parent.exists()


def test_an_existing_memory_store_can_be_used(pipeline, tmp_path):
    states = MemoryStore(tmp_path, dtype="int8", keep_text=False)
    keys = states.add(pipeline, TEXTS, sources="a.txt")
    store = MemoryStateStore(states)
    assert store.write(pipeline, TEXTS) == keys
    assert store.writes == 0
    MemoryStateStore(states, namespace="tenant").write(pipeline, TEXTS)
    assert len(states) == 4
    assert not any(TEXTS[0].encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


class TestWrite:
    def test_the_error_for_documents_says_how_to_write_them(self, pipeline):
        store, document = MemoryStateStore(), Document(TEXTS[0])
        for write in (store.write, store.write_document, store.reference, store.references):
            for wrong in (document, [document], [TEXTS[0], document]):
                with pytest.raises(TypeError, match=r"got a Document: pass document\.page_content.*GradMemCompressor"):
                    write(pipeline, wrong)
        assert list(store.yield_keys()) == []

    def test_the_same_text_is_written_once(self, pipeline):
        store = MemoryStateStore()
        first = store.write(pipeline, [TEXTS[0], TEXTS[1], TEXTS[0]])
        assert first[0] == first[2] != first[1]
        assert store.writes == 2
        assert store.write(pipeline, [TEXTS[1], TEXTS[2]])[0] == first[1]
        assert store.writes == 3
        assert store.reference(pipeline, TEXTS[1]) == first[1]

    def test_a_text_gives_the_same_reference_as_a_list_of_one(self, pipeline):
        store = MemoryStateStore()
        assert store.write(pipeline, TEXTS[0]) == store.write(pipeline, [TEXTS[0]])
        assert MemoryWriter(pipeline=pipeline, store=store).write_texts(TEXTS[0]) == store.write(pipeline, TEXTS[0])
        assert store.writes == 1

    def test_a_long_text_has_a_reference_for_each_segment(self, pipeline):
        store, text = MemoryStateStore(), ". ".join(TEXTS)
        references = store.write_document(pipeline, text, source="book", segment_tokens=20)
        assert len(references) == store.writes == len(list(pipeline.segments(text, 20)))
        assert [entry.key for entry in store.store.entries("book")] == references
        assert store.write_document(pipeline, text, source="book", segment_tokens=20) == references
        assert store.writes == len(references)

    def test_options_and_model_are_part_of_the_identity(self, pipeline):
        store = MemoryStateStore()
        references = {
            store.write(pipeline, TEXTS[:1])[0],
            store.write(pipeline, TEXTS[:1], WriteOptions(steps=3))[0],
            store.write(tiny_pipeline(seed=4), TEXTS[:1])[0],
        }
        assert len(references) == 3

    def test_default_options_do_not_change_the_reference(self, pipeline):
        store = MemoryStateStore()
        assert store.reference(pipeline, TEXTS[0]) == store.reference(pipeline, TEXTS[0], WriteOptions())

    def test_the_stored_state_equals_that_of_write(self, pipeline, tmp_path):
        store = MemoryStateStore(MemoryStore(tmp_path, dtype="float32"))
        (reference,) = store.write(pipeline, TEXTS[:1])
        assert store.get(reference) == pipeline.write(TEXTS[0]).cpu()

    def test_a_directory_outlives_the_store(self, pipeline, tmp_path):
        (reference,) = MemoryStateStore(tmp_path).write(pipeline, TEXTS[:1])
        again = MemoryStateStore(tmp_path)
        assert again.write(pipeline, TEXTS[:1]) == [reference]
        assert again.writes == 0

    def test_a_text_that_cannot_be_written_stores_nothing(self, pipeline):
        store = MemoryStateStore()
        with pytest.raises(ValueError, match="tokens"):
            store.write(pipeline, [TEXTS[0], tiny_text(500)])
        assert list(store.yield_keys()) == []

    def test_batches_are_stored_although_a_later_one_fails(self, pipeline, monkeypatch):
        store, batches = MemoryStateStore(), []
        monkeypatch.setitem(hardware.SATURATED, "cpu", 24)
        write = pipeline.model.base_model._write

        def fail_second(*args, **options):
            batches.append(args)
            if len(batches) == 2:
                raise RuntimeError("The GPU is gone.")
            return write(*args, **options)

        monkeypatch.setattr(pipeline.model.base_model, "_write", fail_second)
        with pytest.raises(RuntimeError, match="gone"):
            store.write(pipeline, TEXTS)
        assert len(list(store.yield_keys())) == 2


def test_gc_leaves_other_namespaces_alone(pipeline):
    mine = MemoryStateStore()
    other = MemoryStateStore(mine.store, namespace="other")
    keep, gone = mine.write(pipeline, TEXTS[:2])
    other.write(pipeline, TEXTS[:1])
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        mine.gc(["x"])
    assert mine.gc([keep]) == 1
    assert list(mine.yield_keys()) == [keep] != [gone]
    assert len(list(other.yield_keys())) == 1
