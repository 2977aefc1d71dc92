"""Files of a directory that are replaced together: by killed processes, by two at once, over existing files."""

import os
import shutil
import threading

import pytest
from killing import kill_at_every_call

from gradmem_adapter.utils.directory import reading_together, replacing_together

OWN = ("one", "parts", "two", "old")


def save(path, version):
    with replacing_together(path, OWN) as folder:
        for name in ("one", "two"):
            (folder / name).write_text(version)
        (folder / "parts").mkdir()
        (folder / "parts" / f"of {version}").write_text(version)
        (folder / "README.md").write_text("a template")


def load(path):
    with reading_together(path, OWN):
        (part,) = os.listdir(path / "parts")
        versions = [(path / name).read_text() for name in ("one", "two", f"parts/{part}")]
        versions += ["first"] if (path / "old").exists() else []
    assert set(versions) == {part.removeprefix("of ")}
    return versions[0]


def make_old(path):
    """An earlier save, with its own files and other people's."""
    with replacing_together(path, OWN) as folder:
        for name in ("one", "two", "old"):
            (folder / name).write_text("first")
        (folder / "parts").mkdir()
        (folder / "parts" / "of first").write_text("first")
    (path / "notes").write_text("notes")
    (path / "README.md").write_text("a card")
    return True


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_a_save_killed_at_any_moment_leaves_whole_files(tmp_path, there):
    """Exhaustively: before every call that changes a directory."""
    path, found = tmp_path / "saved", []
    attempts = kill_at_every_call(save, path, "second")
    while (make_old(path) if there else True) and next(attempts, None):
        found.append(load(path) if path.exists() else "first")
        assert path.exists() or not there
        save(path, "third")  # sweeps
        assert load(path) == "third"
        assert (path / "README.md").read_text() == ("a card" if there else "a template")
        assert sorted(os.listdir(path)) == ["README.md", "SHA256SUMS", *(["notes"] if there else []), *OWN[:-1]]
        assert os.listdir(tmp_path) == ["saved"]
        shutil.rmtree(path)
    assert set(found) == {"first", "second"}
    assert found == sorted(found), "once it is there it stays"


def test_two_writers_and_two_readers_see_whole_saves(tmp_path):
    path, errors, seen = tmp_path / "saved", [], set()
    save(path, "start")

    def loop(work):
        try:
            for _ in range(30):
                work()
        except BaseException as error:
            errors.append(error)

    jobs = [lambda v=v: save(path, v) for v in ("a", "b")] + [lambda: seen.add(load(path))] * 2
    threads = [threading.Thread(target=loop, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert seen <= {"start", "a", "b"}
    assert load(path) in ("a", "b")
    assert sorted(os.listdir(path)) == ["README.md", "SHA256SUMS", "one", "parts", "two"]
    assert os.listdir(tmp_path) == ["saved"]
