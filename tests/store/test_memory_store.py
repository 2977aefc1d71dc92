"""MemoryStore: each text is written once and found again, and faults are named."""

import copy
import dataclasses
import errno
import pickle
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch
from stores import NAMES, PLACES, TEXTS, tiny_pipeline
from tiny import tiny_text

from gradmem_adapter import MemoryState, MemoryStateError, WriteOptions
from gradmem_adapter.store import (
    Entry,
    MemoryStore,
    MemoryStoreError,
    UnknownStateError,
    adding,
    files,
    landing,
    memory_store,
)
from gradmem_adapter.store.whole import of_segments


@pytest.fixture
def counted(pipeline, monkeypatch):
    """The texts that are written."""
    written = []
    write_many = pipeline._write_many
    monkeypatch.setattr(
        pipeline, "_write_many", lambda texts, **rest: written.extend(texts) or write_many(texts, **rest)
    )
    return written


class TestAdd:
    def test_stored_states_equal_those_of_write(self, store, keys, pipeline):
        assert store.get(keys, pipeline.model.fingerprint()) == pipeline.write_many(TEXTS)
        assert store.get(keys[2]) == store.get(keys)[2]

    def test_a_text_is_written_once(self, store, keys, pipeline, counted):
        assert store.add(pipeline, [TEXTS[1], "w1 w2 w3", TEXTS[1], "w1 w2 w3"])[0] == keys[1]
        assert counted == ["w1 w2 w3"]
        assert len(store) == 5

    def test_done_is_called_for_each_batch_once_it_is_stored(self, store, keys, pipeline):
        told = []
        texts = [*TEXTS, "w1 w2 w3", "w4 w5"]
        added = store.add(
            pipeline, texts, max_tokens=1, done=lambda batch: told.append((batch, all(key in store for key in batch)))
        )
        assert sorted(told) == sorted(([key], True) for key in added[4:])

    def test_a_full_disk_is_reported_with_its_path(self, store, keys, pipeline, monkeypatch):
        def full(descriptor):  # as the system reports it for a write, without the file name
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as error:
            store.add(pipeline, ["w1 w2 w3"])
        assert error.value.filename == str(store.path / "states")
        assert len(store) == 4

    def test_a_batch_is_stored_while_the_next_one_is_written(self, store, pipeline, monkeypatch):
        begun, numbers, put = threading.Event(), set(), landing.put

        def second(rows, progress):
            numbers.update(rows)
            if len(numbers) == 2:
                begun.set()

        def put_then(*args):
            assert begun.wait(60), "the second batch waits until the first one is stored"
            put(*args)

        monkeypatch.setattr(landing, "put", put_then)
        store.add(pipeline, TEXTS[:2], max_tokens=1, callback=second)
        assert len(store) == 2

    @pytest.mark.parametrize("where", ["put", "done"])
    def test_a_batch_is_stored_although_the_one_before_it_fails(self, store, pipeline, monkeypatch, where):
        told, put = [], landing.put

        def put_second(index, states, entries, dtype):
            if where == "put" and entries[0].text == TEXTS[1]:
                raise ValueError("not finite")
            put(index, states, entries, dtype)

        def done(keys):
            told.append(keys)
            if where == "done" and len(told) == 1:
                raise ValueError("not finite")

        monkeypatch.setattr(landing, "put", put_second)
        with pytest.raises(ValueError, match="not finite"):
            store.add(pipeline, TEXTS[:2], max_tokens=1, done=done)  # the second is longest and comes first
        assert TEXTS[0] in {entry.text for entry in store.entries()}
        assert set(store) == {key for keys in told for key in keys}

    def test_an_interrupt_while_waiting_for_the_disk_still_reports_what_is_stored(self, store, pipeline, monkeypatch):
        told, waits = [], []

        def interrupted(futures):
            waits.append(futures)
            if len(waits) == 1:
                raise KeyboardInterrupt
            return wait(futures)

        monkeypatch.setattr(adding, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.add(pipeline, TEXTS[:2], max_tokens=1, done=told.extend)
        assert set(store) == set(told)
        assert len(told) == 2

    def test_states_written_before_an_error_are_stored(self, store, pipeline, monkeypatch):
        def fail(rows, progress):
            if 0 in rows:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store.add(pipeline, ["w1", "w1 w2 w3"], max_tokens=1, callback=fail)  # the longest comes first
        assert [entry.text for entry in store.entries()] == ["w1 w2 w3"]

    def test_another_store_in_the_same_directory_finds_them(self, store, keys, pipeline, counted):
        assert MemoryStore(store.path).add(pipeline, TEXTS) == keys
        assert counted == []

    def test_states_a_killed_process_left_unindexed_are_not_written_again(self, store, keys, pipeline, counted):
        with store.index.writing() as connection:
            connection.execute("DELETE FROM states")
        assert len(store) == 0
        store.add(pipeline, TEXTS[:1] + TEXTS, sources=[*NAMES[:1], *NAMES], offsets=[(0, 10), *PLACES])
        assert counted == []
        assert [entry.place for entry in store.entries()] == sorted(zip(NAMES, *zip(*PLACES, strict=True), strict=True))

    def test_a_damaged_state_is_written_again(self, store, keys, pipeline, counted):
        file = store.path / "states" / keys[0][:2] / f"{keys[0]}.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(MemoryStateError, match=keys[0]):
            store.get(keys)
        store.add(pipeline, TEXTS)
        assert counted == [TEXTS[0]]
        assert torch.allclose(store.get(keys).vectors, pipeline.write_many(TEXTS).vectors, atol=1e-5)

    def test_model_configuration_and_options_are_part_of_a_key(self, store, keys, pipeline):
        others = [
            store.key(tiny_pipeline(seed=1), TEXTS[0]),
            store.key(pipeline, TEXTS[0], WriteOptions(steps=3)),
            *(store.key(tiny_pipeline(**{name: 3}), TEXTS[0]) for name in ("write_steps", "write_lr")),
            store.key(tiny_pipeline(write_clip_norm=0.1), TEXTS[0]),
        ]
        assert len({keys[0], *others}) == 6
        assert store.key(tiny_pipeline(), TEXTS[0]) == store.key(pipeline, TEXTS[0], WriteOptions()) == keys[0]
        config = pipeline.model.active_peft_config
        assert config.learn_write_lr == "no"
        for options in (
            WriteOptions(max_memory=2**30),
            WriteOptions(compile=False),
            WriteOptions(steps=config.write_steps, lr=config.write_lr, optimizer=config.write_optimizer),
        ):
            assert store.key(pipeline, TEXTS[0], options) == keys[0]

    def test_there_must_be_a_source_for_each_text(self, store, pipeline):
        with pytest.raises(ValueError, match="Got 4 texts but 2 sources"):
            store.add(pipeline, TEXTS, sources=["a", "b"])
        assert not store.path.exists()

    @pytest.mark.parametrize(
        ("places", "error", "message"),
        [
            ({"sources": Path("a.txt")}, TypeError, r"source must be a string, got .*Path\('a.txt'\)"),
            ({"sources": [5]}, TypeError, "The source must be a string, got 5"),  # which the index would store as "5"
            ({"sources": ["a\udcff"]}, ValueError, "surrogates not allowed. Remove the invalid value"),
            ({"offsets": [(0, 2**70)]}, ValueError, "Offsets must be two integers with 0 <= start <= end"),
            ({"offsets": [(5, 2)]}, ValueError, "Offsets must be two integers"),
            ({"offsets": [(5,)]}, ValueError, "Offsets must be pairs"),
            ({"offsets": [("1", "2")]}, TypeError, "as an integer"),
            ({"metadata": ["title"]}, TypeError, "metadata must be a mapping"),
            ({"metadata": [{"score": float("nan")}]}, ValueError, "not JSON compliant"),
            ({"metadata": [{"path": Path("a.txt")}]}, ValueError, "not JSON serializable"),
            ({"metadata": [{"path": "\udcff"}]}, ValueError, "surrogates not allowed"),
        ],
    )
    def test_invalid_places_and_metadata_are_refused_before_anything_is_written(
        self, store, pipeline, places, error, message
    ):
        with pytest.raises(error, match=message):
            store.add(pipeline, ["w1 w2"], **places)
        assert not store.path.exists()

    def test_offsets_and_metadata_of_other_libraries_are_converted(self, store, pipeline):
        offsets = torch.tensor([[3, 8]])
        store.add(pipeline, ["w1 w2"], sources=["a"], offsets=offsets, metadata=[{"pages": (1, 2), 5: None}])
        (entry,) = store.entries()
        assert (entry.place, entry.metadata) == (("a", 3, 8), {"pages": [1, 2], "5": None})
        assert store.verify().ok

    @pytest.mark.parametrize("texts", [{"a.txt": "w1 w2"}, {"w1 w2"}, b"w1 w2", ["w1", 2]])
    def test_anything_but_texts_is_refused(self, store, pipeline, texts):
        for write in (store.add, lambda pipeline, texts: pipeline.write(texts)):
            with pytest.raises(TypeError, match="Expected a text or a list of texts"):
                write(pipeline, texts)

    def test_metadata_can_be_updated(self, store, keys, pipeline):
        for title in ("old", "new", None):
            store.add(pipeline, TEXTS[:1], sources=NAMES[:1], offsets=PLACES[:1], metadata=title and [{"title": title}])
        assert [entry.metadata for entry in store.entries("b.txt")] == [{"title": "new"}, {}]
        assert store.verify().ok

    def test_self_study_keys_depend_on_the_query_format(self, store):
        pipelines = [tiny_pipeline(query_format=text) for text in ("Q: {query}", "{query}?")]
        assert pipelines[0].model.fingerprint() == pipelines[1].model.fingerprint()
        for objective, different in (("self_study", 2), ("reconstruction", 1)):
            options = WriteOptions(objective=objective)
            assert len({store.key(pipeline, "w1", options) for pipeline in pipelines}) == different

    def test_an_error_in_done_is_passed_on_unchanged(self, store, pipeline):
        def done(keys):
            b"\xff".decode()

        with pytest.raises(UnicodeDecodeError):
            store.add(pipeline, TEXTS, done=done)

    def test_adding_nothing_stores_nothing(self, store, pipeline):
        assert store.add(pipeline, []) == []
        assert (len(store), list(store.entries())) == (0, [])


class TestAddDocument:
    TEXT = f"{tiny_text(9, 1)}.\n\n{tiny_text(7, 2)}.\n\n{tiny_text(8, 3)}."

    def test_segments_are_stored_with_their_places(self, store, pipeline):
        keys = store.add_document(pipeline, self.TEXT, source="book", segment_tokens=12, metadata={"by": "Ada"})
        segments = list(pipeline.segments(self.TEXT, 12))
        assert len(keys) == len(segments) == 3
        assert store.get(keys) == pipeline.write_document(self.TEXT, segment_tokens=12).states
        assert [(entry.key, *entry.place, entry.text, entry.metadata) for entry in store.entries("book")] == [
            (key, "book", segment.start, segment.end, segment.text, of_segments(segments, {"by": "Ada"}))
            for key, segment in zip(keys, segments, strict=True)
        ]

    def test_it_resumes_after_an_interrupt_and_reads_no_further_than_it_writes(
        self, store, pipeline, counted, monkeypatch
    ):
        monkeypatch.setattr(memory_store, "AT_ONCE", 1)
        lines = iter([*self.TEXT.splitlines(keepends=True), *["w1 w2. "] * 10_000])

        def interrupt(keys):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store.add_document(pipeline, lines, segment_tokens=12, done=interrupt)
        assert len(list(lines)) > 9_000
        (first,) = store
        assert store.add_document(pipeline, self.TEXT, segment_tokens=12)[0] == first
        assert counted == [segment.text for segment in pipeline.segments(self.TEXT, 12)]

    def test_is_whole_says_whether_all_segments_are_stored(self, store, pipeline, monkeypatch):
        monkeypatch.setattr(memory_store, "AT_ONCE", 2)
        how = {"source": "book", "segment_tokens": 12}

        def interrupt(keys):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store.add_document(pipeline, self.TEXT, done=interrupt, **how)
        store.add(pipeline, tiny_text(5, 9), sources="note")
        assert {entry.source: store.is_whole(entry) for entry in store.entries()} == {"book": False, "note": True}
        assert len(store.add_document(pipeline, self.TEXT, **how)) == 3
        assert all(map(store.is_whole, store.entries()))
        store.add_document(pipeline, self.TEXT.splitlines(keepends=True), **how)
        store.rebuild()
        (first, *_, last) = store.entries("book")
        store.delete([last.key])
        assert not store.is_whole(last)
        assert store.is_whole(dataclasses.replace(first, metadata={"segments": "seven"}))

    def test_file_names_and_empty_documents_are_refused(self, store, pipeline, tmp_path):
        (tmp_path / "book.txt").write_text(self.TEXT)
        with pytest.raises(ValueError, match=r"name of a file, .*book.txt.*Pass the content: open\("):
            store.add_document(pipeline, str(tmp_path / "book.txt"), segment_tokens=12)
        with pytest.raises(ValueError, match="the document is empty"):
            store.add_document(pipeline, " \n", segment_tokens=12)
        with (tmp_path / "book.txt").open() as file:
            assert len(store.add_document(pipeline, file, segment_tokens=12)) == 3


class TestEntries:
    def test_entries_say_where_what_and_how(self, store, keys, pipeline):
        entries = list(store.entries())
        assert [entry.place for entry in entries] == [
            ("a.txt", 0, 20), ("b.txt", 0, 10), ("b.txt", 10, 30), ("c.txt", 5, 40),
        ]  # fmt: skip
        assert [entry.text for entry in entries] == [TEXTS[i] for i in (1, 0, 2, 3)]
        assert [entry.tokens for entry in entries] == [9, 5, 7, 12]
        assert {entry.fingerprint for entry in entries} == {pipeline.model.fingerprint()}
        assert entries[0].options["write_steps"] == 2
        files = sorted((store.path / "states").rglob("*.safetensors"))
        assert sum(entry.nbytes for entry in entries) == sum(file.stat().st_size for file in files)
        assert [entry.key for entry in store.entries("b.txt")] == [keys[0], keys[2]]

    def test_a_text_of_two_sources_has_two_entries(self, store, keys, pipeline):
        store.add(pipeline, TEXTS[:1], sources="d.txt", offsets=[(7, 9)], metadata=[{"title": "Ü"}])
        store.add(pipeline, TEXTS[:1], sources="d.txt", offsets=[(7, 9)])
        (entry,) = store.entries("d.txt")
        assert (entry.key, entry.place, entry.metadata) == (keys[0], ("d.txt", 7, 9), {"title": "Ü"})
        assert (len(store), len(list(store.entries()))) == (4, 5)

    def test_texts_can_be_left_out(self, tmp_path, pipeline):
        store = MemoryStore(tmp_path, keep_text=False)
        store.add(pipeline, TEXTS)
        assert {entry.text for entry in store.entries()} == {None}
        assert not any(TEXTS[0].encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())

    def test_texts_can_be_added_later(self, tmp_path, pipeline):
        MemoryStore(tmp_path, keep_text=False).add(pipeline, TEXTS, sources="a", metadata=[{"title": "T"}] * 4)
        store = MemoryStore(tmp_path)
        store.add(pipeline, TEXTS, sources="a")
        assert {entry.text for entry in store.entries()} == set(TEXTS)
        assert [entry.metadata for entry in store.entries()] == [{"title": "T"}] * 4
        assert store.choose(pipeline, TEXTS[1])[0].entry.text == TEXTS[1]

    def test_iteration_can_start_and_end_in_different_threads(self, store, keys):
        entries, found = store.entries(), []
        thread = threading.Thread(target=lambda: found.append(next(entries)))
        thread.start()
        thread.join()
        assert len([*found, *entries]) == 4

    def test_an_unfinished_iteration_blocks_nobody(self, store, keys):
        """`rebuild` waits for readers of the index."""
        entries, every_key = store.entries(), iter(store)
        seen = [next(entries), next(every_key)]
        thread = threading.Thread(target=store.rebuild, daemon=True)
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive()
        assert len([*seen, *entries, *every_key]) == 8

    def test_iteration_shows_the_entries_at_its_start_except_removed_ones(self, store, pipeline, monkeypatch):
        monkeypatch.setattr(memory_store, "_AT_ONCE", 1)
        store.add(pipeline, TEXTS, sources=["a", "b", "c", "d"])
        entries = store.entries()
        assert next(entries).source == "a"
        store.forget("c")
        store.add(pipeline, "w1 w2", sources=["b"])
        assert [(entry.source, entry.text) for entry in entries] == [("b", TEXTS[1]), ("d", TEXTS[3])]


class TestPut:
    def test_put_stores_given_states(self, store, pipeline):
        states = pipeline.write(TEXTS[:2])
        entries = [Entry(store.key(pipeline, text), source="s", text=text) for text in TEXTS[:2]]
        store.put(states, entries)
        assert store.get([entry.key for entry in entries]) == states

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_put_keeps_the_dtype_of_states(self, tmp_path, pipeline, dtype):
        """Whatever dtype the store itself writes; what is read is float32."""
        store, state = MemoryStore(tmp_path), pipeline.write(TEXTS[0]).to(dtype=dtype)
        entry = Entry(store.key(pipeline, TEXTS[0]), source="s", text=TEXTS[0])
        store.put(state, [entry])
        assert store.get(entry.key) == state.to(dtype=torch.float32)
        store.add(pipeline, TEXTS[:1], sources="again")
        store.rebuild()
        assert store.get(entry.key) == state.to(dtype=torch.float32)
        (file,) = tmp_path.rglob("*.safetensors")
        assert MemoryState.load(file) == state

    def test_put_converts_to_a_requested_dtype(self, tmp_path, pipeline):
        put, added = MemoryStore(tmp_path / "put"), MemoryStore(tmp_path / "added")
        (key,) = added.add(pipeline, TEXTS[:1])
        put.put(pipeline.write(TEXTS[0]), [Entry(key)], dtype="int8")
        assert put.get(key) == added.get(key)
        with pytest.raises(ValueError, match=r"dtype must be one of .*'int8'\), got 'int4'"):
            put.put(pipeline.write(TEXTS[0]), [Entry(key)], dtype="int4")

    @pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
    def test_put_keeps_fields_of_a_known_key_that_are_not_given(self, tmp_path, pipeline, dtype):
        """As when someone puts back what `get` returned."""
        store = MemoryStore(tmp_path, dtype=dtype)
        keys = store.add(pipeline, TEXTS, sources=NAMES, offsets=PLACES, metadata=[{"title": name} for name in NAMES])
        before = [dataclasses.replace(entry, written=0) for entry in store.entries()]
        query = " ".join(TEXTS)
        chosen = [choice.entry.key for choice in store.choose(pipeline, query)]
        states = store.get(keys)
        files_before = {file: file.stat().st_ino for file in tmp_path.rglob("*.safetensors")}
        store.put(states, [Entry(key) for key in keys])
        assert {file: file.stat().st_ino for file in files_before} == files_before  # without the time of writing them
        assert [dataclasses.replace(entry, written=0) for entry in store.entries()] == before
        assert store.get(keys) == states
        assert [choice.entry.key for choice in store.choose(pipeline, query)] == chosen
        assert store.verify().ok
        assert store.forget("b.txt") == 2

    def test_put_updates_fields_of_a_known_key_that_are_given(self, store, keys, pipeline):
        other = pipeline.write(TEXTS[0], steps=1)
        store.put(other, [Entry(keys[0], *("b.txt", *PLACES[0]), metadata={"title": "new"})])
        store.put(other, [Entry(keys[0], source="d.txt", options={"write_steps": 1})])
        assert store.get(keys[0]) == other
        places = {entry.source: entry for entry in store.entries() if entry.key == keys[0]}
        assert places["b.txt"].metadata == {"title": "new"}
        assert set(places) == {"b.txt", "d.txt"}
        assert places["d.txt"].options == {"write_steps": 1}
        assert places["d.txt"].text == TEXTS[0]
        assert store.verify().ok

    def test_put_replaces_a_damaged_file(self, store, keys, pipeline):
        (store.path / "states" / keys[0][:2] / f"{keys[0]}.safetensors").write_bytes(b"damaged")
        store.put(pipeline.write(TEXTS[0]), [Entry(keys[0])])
        (entry,) = (entry for entry in store.entries() if entry.key == keys[0])
        assert (entry.place, entry.text) == (("b.txt", 0, 10), TEXTS[0])
        assert store.verify().ok

    def test_put_needs_as_many_entries_as_states(self, store, pipeline):
        with pytest.raises(ValueError, match="Got 1 entry for 2 states"):
            store.put(pipeline.write(TEXTS[:2]), [Entry(store.key(pipeline, TEXTS[0]))])

    def test_put_refuses_a_path_as_a_key(self, store, pipeline):
        with pytest.raises(ValueError, match="32 hexadecimal digits"):
            store.put(pipeline.write(TEXTS[0]), [Entry("../../elsewhere")])

    def test_put_refuses_non_finite_states(self, store, pipeline):
        state = pipeline.write(TEXTS[0])
        state.vectors[0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            store.put(state, [Entry(store.key(pipeline, TEXTS[0]))])
        assert len(store) == 0


class TestGet:
    def test_an_unknown_key(self, store, keys):
        with pytest.raises(UnknownStateError, match="no memory state '0000"):
            store.get([keys[0], "0" * 32])

    def test_a_state_of_another_model(self, store, keys):
        with pytest.raises(MemoryStateError, match="was written by model"):
            store.get(keys[0], tiny_pipeline(seed=1).model.fingerprint())

    def test_a_copied_or_renamed_file(self, store, keys):
        one, other = (store.path / "states" / key[:2] / f"{key}.safetensors" for key in keys[:2])
        other.write_bytes(one.read_bytes())
        with pytest.raises(MemoryStateError, match="copied or renamed"):
            store.get(keys[1])


class TestDtypes:
    @pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("bfloat16", 2**-8), ("int8", 0.5 / 127)])
    def test_states_are_as_close_as_the_dtype_allows(self, tmp_path, pipeline, dtype, error):
        store = MemoryStore(tmp_path, dtype=dtype)
        keys = store.add(pipeline, TEXTS)
        found, written = store.get(keys).vectors, pipeline.write_many(TEXTS).vectors
        assert found.dtype == torch.float32
        assert ((found - written).abs() <= error * written.abs().amax(-1, keepdim=True) * 1.001).all()

    def test_a_later_entry_leaves_the_state_unchanged(self, store, keys, pipeline):
        before = store.get(keys)
        MemoryStore(store.path, dtype="int8").add(pipeline, TEXTS, sources="again")
        assert store.get(keys) == before

    def test_every_file_loads_as_a_memory_state(self, tmp_path, pipeline):
        store = MemoryStore(tmp_path, dtype="int8")
        (key,) = store.add(pipeline, TEXTS[:1])
        assert MemoryState.load(tmp_path / "states" / key[:2] / f"{key}.safetensors") == store.get(key)

    def test_other_dtypes_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="dtype must be one of"):
            MemoryStore(tmp_path, dtype="float16")


class TestIndex:
    def test_words_find_texts(self, store, pipeline):
        (key,) = store.add(pipeline, ["the herons w1 reached an island"])
        store.add(pipeline, TEXTS)
        with store.index.reading() as connection:
            found = connection.execute(
                "SELECT key FROM texts JOIN states ON states.id = texts.rowid WHERE texts MATCH 'heron'"
            ).fetchall()
        assert found == [(key,)]

    def test_a_damaged_index(self, store, keys, pipeline):
        store.index.path.write_bytes(b"no index" * 1000)
        with pytest.raises(MemoryStoreError, match=r"damaged .*rebuild"):
            store.add(pipeline, TEXTS)
        assert store.get(keys) == pipeline.write_many(TEXTS)

    def test_a_lost_index(self, store, keys):
        store.index.path.unlink()
        with pytest.raises(MemoryStoreError, match=r"missing.*rebuild"):
            list(store.entries())

    @pytest.mark.parametrize(("version", "message"), [(99, "Upgrade gradmem-adapter"), (1, "older.*rebuild")])
    def test_an_index_of_another_version(self, store, keys, version, message):
        connection = sqlite3.connect(store.index.path)
        connection.execute(f"PRAGMA user_version = {version}")
        connection.close()
        with pytest.raises(MemoryStoreError, match=message):
            len(store)
        store.rebuild()
        assert len(store) == 4


def test_a_text_that_cannot_be_written_is_named_by_its_index(store, keys, pipeline):
    with pytest.raises(ValueError, match="Context 5 has 120 tokens"):
        store.add(pipeline, [*TEXTS, "w1 w2", tiny_text(120)])
    assert set(store) == set(keys)


def test_a_text_that_diverges_is_named_by_its_index(store, pipeline, monkeypatch):
    monkeypatch.setattr(adding, "AT_ONCE", 2)
    with pytest.warns(RuntimeWarning, match="sample 2 is not finite"):
        store.add(pipeline, TEXTS, options=WriteOptions(steps=3, lr=1e38))


def test_delete_removes_states_and_ignores_unknown_keys(store, keys):
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        store.delete([keys[0], "x"])
    store.delete([keys[0], "0" * 32, keys[2]])
    assert set(store) == {keys[1], keys[3]}
    assert store.verify().states == 2


def test_concurrent_requests_write_a_text_once(store, pipeline, monkeypatch):
    """The others wait for it; if its write fails, they write it themselves."""
    all_in, write_many, calls = threading.Barrier(8), pipeline._write_many, []

    def slow(texts, **options):
        calls.append(list(texts))
        if len(calls) == 1:
            time.sleep(0.2)
            raise RuntimeError("once")
        return write_many(texts, **options)

    def ask(i):
        all_in.wait()
        return store.add(pipeline, [TEXTS[i % 2], TEXTS[2]])

    monkeypatch.setattr(pipeline, "_write_many", slow)
    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(ask, i) for i in range(8)]
        errors = [future.exception() for future in futures]
    assert sum(error is not None for error in errors) == 1
    written = [text for call in calls[1:] for text in call]
    assert sorted(written) == sorted(TEXTS[:3])
    expected = [store.key(pipeline, text) for text in TEXTS]
    for i, future in enumerate(futures):
        assert errors[i] or future.result() == [expected[i % 2], expected[2]]


def test_a_copy_of_a_store_does_not_wait_for_the_original(store, pipeline, monkeypatch):
    copies, write_many = [], pipeline._write_many

    def copy_meanwhile(*args, **kwargs):
        copies.extend((copy.deepcopy(store), pickle.loads(pickle.dumps(store))))
        return write_many(*args, **kwargs)

    monkeypatch.setattr(pipeline, "_write_many", copy_meanwhile)
    keys = store.add(pipeline, TEXTS[0])
    for same in copies:
        assert same.add(pipeline, TEXTS[0]) == keys
    assert len(copies) == 2
