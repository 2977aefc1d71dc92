"""Files that are whole or not there, and texts."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gradmem_adapter.utils.temporary import temporary_directory

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What an `OSError` says of a disk, or of a share of it, without room."""


@contextmanager
def opening(what: str) -> Iterator[None]:
    """Whatever a library raises of a file that it cannot make sense of becomes an error that names the file.

    Args:
        what (`str`): what is opened, for the message.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: anything else that is wrong with it.
    """
    try:
        yield
    except Exception as error:
        from torch import OutOfMemoryError  # not where no more than a text is read

        if isinstance(error, ImportError | MemoryError | OutOfMemoryError):  # the machine's fault
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{what} cannot be opened: {error or type(error).__name__}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` when the block ends; an error leaves `path` as it was.

    A file that is replaced keeps its permissions and, where that is allowed, its owner; a new one takes the umask's.
    Of a symbolic link the target is replaced.

    Args:
        path (`Path`): the file to make or to replace.

    Raises:
        FileNotFoundError: the directory does not exist.
        OSError: `path` is something else than a file, or cannot be written.
    """
    target = _followed(path)
    _check_target(target)
    with errors_named(path), temporary_directory(target.parent) as folder:
        temporary = folder / target.name
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if target.exists():
            _take_over(temporary, target.stat())
        os.replace(temporary, target)


def _followed(path: Path) -> Path:
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _check_target(path: Path) -> None:
    """Raise unless a file may be made or replaced there."""
    if path.is_symlink():
        raise OSError(f"{str(path)!r} is a link that leads to itself; name a file.")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory; name a file.")
    if path.exists() and not path.is_file():
        raise OSError(f"{str(path)!r} is no regular file but a device, a pipe or a socket, and is not replaced.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no directory {str(path.parent)!r} to save {path.name!r} in; make it first.")


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """What keeps a file from being written is an `OSError` that names it, and not what was to become it.

    Args:
        path (`Path`): the file or directory that is written inside the block.
    """
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        raise OSError(number, f"cannot be written: {os.strerror(number)}", str(path)) from error


def _number(error: Exception) -> int | None:
    """The system's number of an error. Safetensors and tokenizers have it in the text of their own; torch has none."""
    if isinstance(error, OSError):
        return error.errno
    if match := re.search(r"\(os error (\d+)\)", str(error)):
        return int(match[1])
    return errno.EIO if re.search("PytorchStreamWriter failed|inline_container|iostream error", str(error)) else None


def _take_over(file: Path, replaced: os.stat_result) -> None:
    """Give a file the owner and the permissions of the one that it replaces."""
    own = file.stat()
    if hasattr(os, "chown") and (own.st_uid, own.st_gid) != (replaced.st_uid, replaced.st_gid):
        with suppress(PermissionError):
            os.chown(file, replaced.st_uid, replaced.st_gid)
    file.chmod(stat.S_IMODE(replaced.st_mode))


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, and nothing that only looks like one: a pipe could wait, and a device go on, for ever.

    Args:
        path (`Path`): the file, or a link to it.

    Raises:
        OSError: it is not there, cannot be opened or is no regular file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(f"{str(path)!r} is no regular file but a device, a pipe or a socket, and is not read.")
    return path.open("rb")


def readable(name: str) -> str:
    """A name without the bytes that are none in UTF-8, which Linux allows in those of files and nobody can print.

    Python has them as halves of characters. Others are left to whoever refuses them: they are of no file's name.

    Args:
        name (`str`): of a file, or what a loader made of it.
    """
    return re.sub("[\udc80-\udcff]", "\N{REPLACEMENT CHARACTER}", name)


def read_text(path: Path, *, max_bytes: int = 2**30) -> str:
    """A text in UTF-8, gzipped (`.gz`) or not, without the mark that may stand before it (byte-order mark).

    Args:
        path (`Path`): the file.
        max_bytes (`int`, *optional*, defaults to 1 GiB): how long the text may be; no more is read or inflated.

    Raises:
        OSError: the file cannot be opened, or is no regular file.
        ValueError: it is damaged, too long or not in UTF-8; the message names it.
    """
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > max_bytes:
                raise ValueError(f"{path} has {size:,} bytes, and a text of more than {max_bytes:,} bytes is not read.")
            data = (gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file).read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ValueError(f"{path} inflates to a text of more than {max_bytes:,} bytes, and no more are read.")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged, or not gzipped: {error}.") from error
    return decoded(str(path), data)


_NO_TEXTS = {b"%PDF-": "a PDF", b"PK\x03\x04": "a zip archive, as .docx, .odt and .epub are"}
"""How files begin that hold a text and are none, and what they are."""


def kind_of_no_text(data: bytes) -> str | None:
    """What bytes are that hold a text in a form of their own, by how they begin; None: none that is known.

    Args:
        data (`bytes`): the first ones, or all.
    """
    return next((kind for start, kind in _NO_TEXTS.items() if data.startswith(start)), None)


def decoded(name: str, data: bytes) -> str:
    """The text of bytes in UTF-8, without the mark that may stand before it.

    Args:
        name (`str`): where they come from, for the message.
        data (`bytes`): all of them.

    Raises:
        ValueError: they are in another encoding, damaged, or a PDF or the like.
    """
    if (kind := kind_of_no_text(data)) is not None:
        raise ValueError(f"{name} is {kind}, and no text. Extract its text first, and give that.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text in UTF-8: {error}. Save it as UTF-8.") from error


def check_writable(path: Path, *, inputs: Iterable[Path] = ()) -> None:
    """Find out before the work, not after it, that a file cannot be written.

    Args:
        path (`Path`): the file that will be written; it is left as it is.
        inputs (`Iterable[Path]`, *optional*): the files that are read, none of which it may be.

    Raises:
        OSError: it cannot; the message says why.
        ValueError: it is one of the inputs, by whatever name.
    """
    target = _followed(path)
    _check_target(target)
    for file in inputs:
        if target.exists() and os.path.exists(file) and target.samefile(file):
            raise ValueError(
                f"{str(path)!r} is one of the inputs ({str(file)!r}): writing it would destroy what it holds."
            )
    with errors_named(path), temporary_directory(target.parent):
        pass


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal digits.

    Args:
        path (`Path`): a regular file.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
