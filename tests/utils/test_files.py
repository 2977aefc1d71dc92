"""Files that replace others: permissions, owners, links, what is not a regular file; files that cannot be opened."""

import gzip
import os
import socket
import stat

import pytest

from gradmem_adapter.utils.files import check_writable, opening, read_text, replacing


def replace(path, content=b"new"):
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@pytest.fixture
def umask():
    """A function that sets the umask for one test."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_takes_the_umask(tmp_path, umask, mask, mode):
    umask(mask)
    replace(tmp_path / "file")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o400])
def test_a_replaced_file_keeps_its_permissions(tmp_path, mode):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(mode)
    replace(tmp_path / "file")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_a_replaced_file_keeps_its_owner(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    os.chown(tmp_path / "file", 1234, 2345)
    replace(tmp_path / "file")
    assert ((tmp_path / "file").stat().st_uid, (tmp_path / "file").stat().st_gid) == (1234, 2345)


def test_an_unfinished_file_is_private_to_its_owner(tmp_path):
    with replacing(tmp_path / "file") as temporary:
        assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700
        temporary.write_bytes(b"new")


def test_the_target_of_a_link_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("elsewhere/file")
    (tmp_path / "link to link").symlink_to("link")
    replace(tmp_path / "link to link")
    assert (tmp_path / "link to link").is_symlink()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path / "elsewhere") == ["file"]


def test_replacing_a_dangling_link_creates_its_target(tmp_path):
    (tmp_path / "link").symlink_to("file")
    replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["fifo", "socket", "link to a fifo", "directory"])
def test_only_regular_files_are_replaced_or_called_writable(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    path = tmp_path / "there"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link to a fifo":
        os.mkfifo(tmp_path / "target")
        path.symlink_to("target")
    elif kind == "directory":
        path.mkdir()
    else:
        socket.socket(socket.AF_UNIX).bind("there")
    before = path.lstat()
    for function in (check_writable, replace):
        with pytest.raises(OSError, match=r"is a directory|a regular file"):
            function(path)
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)


def test_an_input_is_not_writable_under_any_name(tmp_path):
    (tmp_path / "notes").write_bytes(b"notes")
    (tmp_path / "link").symlink_to("notes")
    os.link(tmp_path / "notes", tmp_path / "other name")
    for output in ("notes", "link", "other name", "../" + tmp_path.name + "/notes"):
        with pytest.raises(ValueError, match="is one of the inputs"):
            check_writable(tmp_path / output, inputs=[tmp_path / "absent", tmp_path / "notes"])
    check_writable(tmp_path / "new", inputs=[tmp_path / "notes"])
    assert sorted(os.listdir(tmp_path)) == ["link", "notes", "other name"]


@pytest.mark.parametrize("suffix", ["txt", "gz"])
def test_reading_a_text_is_limited_to_max_bytes(tmp_path, suffix):
    path = tmp_path / f"text.{suffix}"
    path.write_bytes(gzip.compress(b"x" * 1000) if suffix == "gz" else b"x" * 1000)
    assert read_text(path, max_bytes=1000) == "x" * 1000
    with pytest.raises(ValueError, match=r"at most 999|more than 999 bytes"):
        read_text(path, max_bytes=999)


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    (tmp_path / "text").write_bytes("\ufeffw1 \ufeff w2".encode())
    assert read_text(tmp_path / "text") == "w1 \ufeff w2"


def test_pipes_and_devices_are_refused_as_texts(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        with pytest.raises(OSError, match="expected a regular file"):
            read_text(path)


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyError("NONE"), r"KeyError\('NONE'\)"), (EOFError(), r"EOFError\(\)"), (ValueError("no"), "no")],
)
def test_what_cannot_be_opened_is_told_with_the_error(error, said):
    with pytest.raises(ValueError, match=f"^the file cannot be opened: {said}$"), opening("the file"):
        raise error
