"""Faults in a store are found and named, whole states stay usable, and forgotten ones are gone."""

import threading
from pathlib import Path

import pytest
from stores import NAMES, TEXTS

from gradmem_adapter.store import MemoryStore, MemoryStoreError, Stats, files, upkeep
from gradmem_adapter.utils.temporary import PREFIX


def file_of(store, key):
    return store.path / "states" / key[:2] / f"{key}.safetensors"


def damage(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


class TestVerify:
    def test_a_whole_store(self, store, keys):
        report = store.verify()
        assert (report.ok, report.states, report.leftovers) == (True, 4, ())

    def test_an_empty_store(self, store):
        assert store.verify().ok

    def test_every_fault_is_named(self, store, keys):
        damage(file_of(store, keys[0]))
        file_of(store, keys[1]).unlink()
        with store.index.writing() as connection:
            connection.execute("DELETE FROM states WHERE key = ?", (keys[2],))
        (store.path / f"{PREFIX}1-x").mkdir()
        (store.path / "states" / "notes.txt").write_text("mine")
        report = store.verify()
        assert not report.ok
        assert report.states == 1
        assert list(report.damaged) == sorted(keys[:2])
        assert "digest" in report.damaged[keys[0]]
        assert "missing" in report.damaged[keys[1]]
        assert report.unlisted == (keys[2],)
        assert report.leftovers == (f"{PREFIX}1-x", "states/notes.txt")
        assert store.get(keys[3])

    def test_an_index_that_contradicts_its_states(self, store, keys):
        with store.index.writing() as connection:
            connection.execute("UPDATE places SET source = 'other' WHERE source = 'a.txt'")
        assert store.verify().unlisted == (keys[1],)
        store.gc()
        assert store.verify().ok
        assert {entry.source for entry in store.entries()} == set(NAMES)

    def test_an_unreadable_state_is_named_and_kept(self, store, keys):
        file = file_of(store, keys[0])
        file.rename(file.with_name("kept"))
        file.mkdir()
        report = store.verify()
        assert (report.states, list(report.damaged)) == (3, [keys[0]])
        assert "Is a directory" in report.damaged[keys[0]]
        assert store.gc() == []
        file.rmdir()
        file.with_name("kept").rename(file)
        assert store.verify().ok

    @pytest.mark.parametrize(
        "damage", ["places SET metadata = '{'", "places SET start = 'x'", "states SET key = '../x'"]
    )
    def test_invalid_rows_of_the_index(self, store, keys, damage):
        with store.index.writing() as connection:
            connection.execute("PRAGMA defer_foreign_keys = ON")
            connection.execute(f"UPDATE {damage} WHERE key = ?", keys[:1])
            connection.execute("UPDATE places SET key = '../x' WHERE key NOT IN (SELECT key FROM states)")
        with pytest.raises(MemoryStoreError, match=r"damaged \(.*rebuild"):
            store.verify()
        assert store.rebuild().ok
        assert store.verify().ok

    def test_damaged_pages_of_the_index(self, store, keys):
        data = bytearray(store.index.path.read_bytes())
        data[4096 + 8 : 5 * 4096] = bytes(4 * 4096 - 8)
        store.index.path.write_bytes(data)
        with pytest.raises(MemoryStoreError, match="rebuild"):
            store.verify()


class TestGc:
    def test_whole_states_stay_and_the_rest_goes(self, store, keys, pipeline):
        damage(file_of(store, keys[0]))
        with store.index.writing() as connection:
            connection.execute("DELETE FROM states WHERE key = ?", (keys[2],))
        (store.path / f"{PREFIX}1-x").mkdir()
        assert store.gc() == [keys[0]]
        report = store.verify()
        assert (report.ok, report.states, report.leftovers) == (True, 3, ())
        store.add(pipeline, TEXTS, sources=NAMES)
        assert len(store) == 4

    def test_keep_limits_what_stays(self, store, keys):
        assert set(store.gc(keep=keys[:1])) == set(keys[1:])
        assert [entry.key for entry in store.entries()] == keys[:1]
        assert len(list((store.path / "states").rglob("*.safetensors"))) == 1

    def test_keep_takes_a_single_key_and_refuses_invalid_ones(self, store, keys):
        for wrong in ("", "x", [keys[0], "x"]):
            with pytest.raises(ValueError, match="32 hexadecimal digits"):
                store.gc(keep=wrong)
        assert len(store) == 4
        store.gc(keep=keys[1])
        assert list(store) == [keys[1]]


class TestForget:
    def test_a_forgotten_source_is_gone_from_the_disk(self, tmp_path, pipeline):
        store = MemoryStore(tmp_path)
        store.add(pipeline, ["abcdef w1 w2"], sources="secret.txt")
        store.add(pipeline, TEXTS, sources="others.txt")
        assert any(b"abcdef" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
        assert store.forget("secret.txt") == 1
        for word in (b"abcdef", b"secret"):
            assert not any(word in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
        assert store.verify().states == 4

    def test_states_shared_with_another_source_stay(self, store, keys, pipeline):
        store.add(pipeline, TEXTS[:1], sources="d.txt")
        before = store.get(keys[0])
        assert store.forget("b.txt") == 1
        assert store.get(keys[0]) == before
        assert [entry.source for entry in store.entries()] == ["a.txt", "c.txt", "d.txt"]
        assert store.verify().ok
        assert store.forget("d.txt") == 1
        assert not file_of(store, keys[0]).exists()

    def test_some_keys_of_a_source_can_be_forgotten(self, store, keys, pipeline):
        assert store.add(pipeline, TEXTS[:2], sources="d.txt") == keys[:2]
        (own,) = store.add(pipeline, ["w9 w8"], sources="d.txt")
        assert store.forget("d.txt", [own, keys[0], "0" * 32]) == 1
        assert [entry.key for entry in store.entries("d.txt")] == [keys[1]]
        assert set(store) == set(keys)
        assert store.forget("d.txt", []) == 0
        with pytest.raises(ValueError, match="key"):
            store.forget("d.txt", ["../x"])

    @pytest.mark.parametrize("turn", [1, 2], ids=["is seen to be there", "is read"])
    def test_forgetting_while_another_process_adds_the_text(self, store, pipeline, monkeypatch, turn):
        """It is written again if it is gone, and the forgotten source does not come back with it."""
        (key,) = store.add(pipeline, TEXTS[0], sources="a.txt")
        store.add(pipeline, TEXTS[1], sources="a.txt")
        read_file, reads = files.read_file, []
        forgetting = threading.Thread(target=MemoryStore(store.path).forget, args=["a.txt"])

        def forget_meanwhile(file):
            found = read_file(file)
            reads.append(file)
            if len(reads) == turn:
                forgetting.start()
                forgetting.join(0.3)  # it may have to wait
            return found

        monkeypatch.setattr(files, "read_file", forget_meanwhile)
        assert store.add(pipeline, TEXTS[0], sources="b.txt") == [key]
        forgetting.join()
        assert [(entry.key, entry.source) for entry in store.entries()] == [(key, "b.txt")]
        assert store.verify().ok
        assert store.get(key).equal(pipeline.write(TEXTS[0]))

    def test_nothing_is_overwritten_when_nothing_is_removed(self, store, keys, pipeline, monkeypatch):
        store.add(pipeline, TEXTS, sources="d.txt")
        monkeypatch.setattr(upkeep, "_overwrite", None)
        assert store.forget("d.txt") == store.forget("unknown") == 0
        assert set(store) == set(keys)

    def test_an_unknown_source(self, store, keys):
        assert store.forget("unknown") == 0
        with pytest.raises(TypeError, match="Sources and keys of a memory store must be strings"):
            store.forget(Path("a.txt"))
        assert len(store) == 4


class TestRebuild:
    @pytest.mark.parametrize("wrong", ["lost", "damaged", "whole"])
    def test_the_rebuilt_index_equals_the_old_one(self, store, keys, pipeline, wrong):
        before = list(store.entries())
        if wrong == "lost":
            store.index.path.unlink()
        elif wrong == "damaged":
            store.index.path.write_bytes(b"no index" * 1000)
        report = store.rebuild()
        assert (report.ok, report.states, report.leftovers) == (True, 4, ())
        assert sorted(store.entries(), key=str) == sorted(before, key=str)
        assert store.verify().ok

    def test_damaged_states_are_named(self, store, keys):
        damage(file_of(store, keys[3]))
        assert list(store.rebuild().damaged) == [keys[3]]
        assert len(store) == 3


def test_stats(store, keys, pipeline):
    store.add(pipeline, TEXTS[:1], sources="d.txt")
    nbytes = sum(file.stat().st_size for file in store.path.rglob("*.safetensors"))
    assert store.stats() == Stats(4, 4, 33, nbytes, {pipeline.model.fingerprint(): 4})
