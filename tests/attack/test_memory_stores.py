"""Memory stores: several writers, killed processes, full and read-only disks."""

import errno
import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from jobs import fill_store, key, put_and_forget, put_state, stored_state
from killing import SERVER, kill_at_every_call, kill_often
from test_full_disks import fill_up, mount, small  # noqa: F401

from gradmem_adapter import MemoryState
from gradmem_adapter.store import Entry, MemoryStore
from gradmem_adapter.utils.temporary import PREFIX


def test_indexed_states_are_whole_after_kills(tmp_path):
    store = MemoryStore(tmp_path)
    for _ in kill_often(fill_store, tmp_path, kills=5, longest=0.1):
        report = store.verify()
        assert not report.damaged
        assert len(report.leftovers) <= 1, "more than the last process left is there"
    store.gc()
    assert store.verify().ok
    assert not list(tmp_path.glob(f"{PREFIX}*"))
    assert [store.get(entry.key) for entry in store.entries()] == [stored_state(i) for i in range(len(store))]


@pytest.mark.slow
def test_indexed_states_are_whole_after_many_kills(tmp_path):
    for _ in kill_often(fill_store, tmp_path, kills=100, longest=0.2):
        assert not MemoryStore(tmp_path).verify().damaged


def test_a_kill_before_any_change_of_a_directory_can_be_repaired(tmp_path):
    path = tmp_path / "store"
    for count in kill_at_every_call(put_and_forget, path):
        store = MemoryStore(path)
        assert set(store.verify().damaged) <= {key(3)}, count  # its file went before its row
        store.gc()
        assert store.verify().ok
        put_and_forget(path)
        assert [(entry.key, entry.source) for entry in store.entries()] == [(key(2), "other")]
        if count < 9:  # the store is still being made
            shutil.rmtree(path)
    assert not list(path.glob(f"{PREFIX}*"))


def test_several_processes_and_threads_can_write_the_same_states(tmp_path):
    processes = [SERVER.Process(target=fill_store, args=(int, tmp_path, 20)) for _ in range(2)]
    threads = [threading.Thread(target=fill_store, args=(int, tmp_path, 20)) for _ in range(2)]
    for worker in (*processes, *threads):
        worker.start()
    for worker in (*processes, *threads):
        worker.join()
    assert [process.exitcode for process in processes] == [0, 0]
    report = MemoryStore(tmp_path).verify()
    assert (report.ok, report.states, report.leftovers) == (True, 20, ())


def test_the_index_can_be_rebuilt_while_others_write(tmp_path):
    put_state(tmp_path, 0)
    writers = [threading.Thread(target=fill_store, args=(int, tmp_path, 20)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert MemoryStore(tmp_path).rebuild().ok
    report = MemoryStore(tmp_path).verify()
    assert (report.ok, report.states) == (True, 20)


def test_a_full_disk_leaves_a_whole_store(small):  # noqa: F811
    store = MemoryStore(small / "store")
    with pytest.raises(OSError, match="No space left") as error:
        fill_store(int, store.path)
    assert error.value.errno == errno.ENOSPC
    assert (count := len(store)) > 3
    report = store.verify()
    assert not report.damaged
    assert report.states + len(report.unlisted) >= count
    assert not report.leftovers
    assert store.get(key(0)) == stored_state(0)


def test_writers_wait_for_a_reader_without_write_access(small, tmp_path):  # noqa: F811
    """SQLite assumes that such a file does not change, and would read half of a concurrent write."""
    put_state(small / "store", 0)
    (tmp_path / "view").mkdir()
    mount("--bind", small, tmp_path / "view")
    try:
        mount("-o", "remount,bind,ro", tmp_path / "view")
        store = MemoryStore(tmp_path / "view" / "store")
        writer = threading.Thread(target=put_state, args=(small / "store", 1))
        with store.index.reading():
            writer.start()
            writer.join(timeout=0.5)
            assert writer.is_alive()
        writer.join()
        assert set(store) == {key(0), key(1)}
    finally:
        subprocess.run(["umount", "--lazy", tmp_path / "view"], check=True)


@pytest.mark.parametrize("killed", [False, True], ids=["closed", "with changes of a killed process beside it"])
def test_a_store_on_a_full_disk_can_be_read_and_cleared(small, tmp_path, killed):  # noqa: F811
    """SQLite cannot create the file that connections share there."""
    store = MemoryStore(small / "store")
    large = MemoryState(torch.ones(1, 128, 128), torch.tensor([1]), torch.zeros(1, 1), "model")
    store.put(large, [Entry(key(2), "source")])
    for number in range(2):
        put_state(store.path, number, "source")
    if killed:
        with store.index.reading() as connection:
            cursor = connection.execute("SELECT key FROM states")
            put_state(store.path, 3, "another")
            shutil.copytree(store.path, tmp_path / "copy")
            cursor.close()
        shutil.rmtree(store.path)
        shutil.copytree(tmp_path / "copy", store.path)
        os.remove(store.path / "index.sqlite-shm")
    count = 3 + killed
    fill_up(small)
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: len(store), range(20))) == {count}
    assert {entry.key for entry in store.entries("source")} == {key(number) for number in range(3)}
    assert store.get(key(0)) == stored_state(0)
    assert store.verify().ok
    with pytest.raises(OSError, match="No space left") as error:
        put_state(store.path, 9)
    assert error.value.errno == errno.ENOSPC
    store.forget("source")  # makes the room that it needs
    (small / "filler").unlink()
    assert not store.verify().damaged
    assert set(store) == ({key(3)} if killed else set())
    put_state(store.path, 9)
    assert store.verify().ok
    assert key(9) in store


@pytest.mark.parametrize("remove", [lambda store: store.delete([key(0)]), lambda store: store.forget("source")])
def test_a_failed_removal_leaves_the_state_whole(small, remove):  # noqa: F811
    """A small state does not free enough room for the entry in SQLite's log."""
    store = MemoryStore(small / "store")
    put_state(store.path, 0, "source")
    fill_up(small)
    with pytest.raises(OSError, match="No space left"):
        remove(store)
    assert store.get(key(0)) == stored_state(0)
    report = store.verify()
    assert (report.damaged, report.leftovers) == ({}, ())


@pytest.mark.parametrize("listed", [True, False], ids=["before the index forgot it", "after"])
def test_a_kill_while_a_state_is_removed_can_be_repaired(tmp_path, listed):
    store = MemoryStore(tmp_path / "store")
    put_state(store.path, 0)
    put_state(store.path, 1)
    (file,) = store.path.glob(f"states/*/{key(0)}.safetensors")
    if not listed:
        shutil.copy(file, tmp_path / "kept")
        store.delete([key(0)])
        shutil.copy(tmp_path / "kept", file)
    file.rename(file.with_name(file.name + ".going"))
    assert store.gc() == []
    assert (key(0) in store) == listed
    report = store.verify()
    assert (report.ok, report.states, report.leftovers) == (True, 1 + listed, ())


def test_a_read_only_store_can_be_read(small):  # noqa: F811
    store = MemoryStore(small / "store")
    put_state(store.path, 0, "source")
    mount("-o", "remount,ro", small)
    assert store.get(key(0)) == stored_state(0)
    assert [entry.source for entry in store.entries()] == ["source"]
    assert store.verify().ok
    for write in (lambda: put_state(store.path, 1), lambda: store.forget("source"), store.rebuild):
        with pytest.raises(OSError, match="Read-only") as error:
            write()
        assert error.value.errno == errno.EROFS
        assert str(store.path) in str(error.value.filename)


def test_a_read_only_store_includes_the_log_of_a_killed_process(small, tmp_path):  # noqa: F811
    """Its changes are in SQLite's log beside the index."""
    path = tmp_path / "store"
    put_state(path, 0)
    with MemoryStore(path).index.reading() as connection:
        cursor = connection.execute("SELECT key FROM states")  # keeps the next change in the log
        put_state(path, 1)
        store = MemoryStore(shutil.copytree(path, small / "store"))
        cursor.close()
    mount("-o", "remount,ro", small)
    assert len(store) == 2
    mount("-o", "remount,rw", small)
    os.remove(store.path / "index.sqlite-shm")
    mount("-o", "remount,ro", small)
    assert {entry.key for entry in store.entries()} == {key(0), key(1)}
    assert store.verify().ok
    mount("-o", "remount,rw", small)
    put_state(store.path, 2)
    assert len(store) == 3


def test_an_unreadable_index_is_named(tmp_path):
    put_state(tmp_path, 0)
    os.remove(tmp_path / "index.sqlite")
    (tmp_path / "index.sqlite").mkdir()
    with pytest.raises(OSError, match=r"index\.sqlite"):
        len(MemoryStore(tmp_path))
