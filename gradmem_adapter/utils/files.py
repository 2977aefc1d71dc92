"""Files that are written completely or not at all, and reading of texts."""

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
from typing import BinaryIO, cast

from gradmem_adapter.utils.temporary import temporary_directory

FULL = (errno.ENOSPC, errno.EDQUOT)
"""The `errno` of an `OSError` for a full disk or an exceeded quota."""


@contextmanager
def opening(what: str) -> Iterator[None]:
    """Turn any error that a library raises for a file it cannot read into one that names the file.

    Args:
        what (`str`): what is opened, for the message.

    Raises:
        OSError: it does not exist or cannot be read.
        ValueError: anything else is wrong with it.
    """
    try:
        yield
    except Exception as error:
        from torch import OutOfMemoryError  # imported late: reading a text needs no torch

        if isinstance(error, ImportError | MemoryError | OutOfMemoryError):  # not a fault of the file
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        bare = isinstance(error, LookupError) or not str(error)  # the text of a KeyError is the key alone
        raise kind(f"{what} cannot be opened: {repr(error) if bare else error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, and replaces `path` by that file when the block ends. On an error `path` is unchanged.

    A replaced file keeps its permissions and, if allowed, its owner; a new one gets those of the umask. If `path` is a
    symbolic link, its target is replaced.

    Raises:
        FileNotFoundError: the directory does not exist.
        OSError: `path` is not a file, or cannot be written.
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
    """Raise unless a file can be created or replaced there."""
    if path.is_symlink():
        raise OSError(f"{str(path)!r} is a symbolic link that points to itself; pass the path of a file.")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory; pass the path of a file.")
    if path.exists() and not path.is_file():
        raise OSError(
            f"{str(path)!r} is a device, a pipe or a socket, and is not replaced; pass the path of a regular file."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"There is no directory {str(path.parent)!r} to save {path.name!r} in; create it first."
        )


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Turn an error while writing into an `OSError` that names `path` and not the temporary file.

    Args:
        path (`Path`): the file or directory that is written in the block.
    """
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        raise OSError(number, f"cannot be written: {os.strerror(number)}", str(path)) from error


def _number(error: Exception) -> int | None:
    """The `errno` of an error. Safetensors and tokenizers put it into the text of their own exceptions; torch has
    none."""
    if isinstance(error, OSError):
        return error.errno
    if match := re.search(r"\(os error (\d+)\)", str(error)):
        return int(match[1])
    return errno.EIO if re.search("PytorchStreamWriter failed|inline_container|iostream error", str(error)) else None


def _take_over(file: Path, replaced: os.stat_result) -> None:
    """Give a file the owner and the permissions of the file that it replaces."""
    own = file.stat()
    if hasattr(os, "chown") and (own.st_uid, own.st_gid) != (replaced.st_uid, replaced.st_gid):
        with suppress(PermissionError):
            os.chown(file, replaced.st_uid, replaced.st_gid)
    file.chmod(stat.S_IMODE(replaced.st_mode))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Reading from a pipe or a device might never end.

    Raises:
        OSError: it does not exist, cannot be opened, or is not a regular file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(f"{str(path)!r} is a device, a pipe or a socket; expected a regular file.")
    return path.open("rb")


def readable(name: str) -> str:
    """A file name with bytes that are not UTF-8 replaced. Linux allows them in file names, but they cannot be printed.

    Python represents them as lone surrogates U+DC80 to U+DCFF. Other surrogates do not come from file names and stay.

    Args:
        name (`str`): a file name, or a text that a loader made from it.
    """
    return re.sub("[\udc80-\udcff]", "\N{REPLACEMENT CHARACTER}", name)


@contextmanager
def decompressed(path: Path) -> Iterator[BinaryIO]:
    """A regular file opened for reading, decompressed if its name ends with `.gz`; `ValueError` if it is damaged."""
    try:
        with open_regular(path) as file:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if path.suffix == ".gz" else file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not a gzip file: {error}.") from error


def read_text(path: Path, *, max_bytes: int = 2**30) -> str:
    """Read a text in UTF-8, gzipped (`.gz`) or not, without its byte-order mark.

    Args:
        path (`Path`): the file.
        max_bytes (`int`, *optional*, defaults to 1 GiB): the longest text to read; no more is read or decompressed.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
        ValueError: it is damaged, too long or not UTF-8; the message names the file.
    """
    with decompressed(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise ValueError(f"{path} has {size:,} bytes; a text may have at most {max_bytes:,}.")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path} decompresses to more than {max_bytes:,} bytes, the most that a text may have.")
    return decoded(str(path), data)


_NO_TEXTS = {b"%PDF-": "a PDF", b"PK\x03\x04": "a zip archive, as .docx, .odt and .epub are"}
"""The first bytes of document formats that are not plain text, and what to call them."""


def kind_of_no_text(data: bytes) -> str | None:
    """The document format of some bytes by their beginning; None if it is not a known one."""
    return next((kind for start, kind in _NO_TEXTS.items() if data.startswith(start)), None)


def decoded(name: str, data: bytes) -> str:
    """Decode bytes in UTF-8, without a byte-order mark.

    Args:
        name (`str`): where the bytes come from, for the message.
        data (`bytes`): all of them.

    Raises:
        ValueError: they are in another encoding, damaged, or a document such as a PDF.
    """
    if (kind := kind_of_no_text(data)) is not None:
        raise ValueError(f"{name} is {kind}, not plain text. Extract its text first.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not a text in UTF-8: {error}. Save it as UTF-8.") from error


def check_writable(path: Path, *, inputs: Iterable[Path] = ()) -> None:
    """Raise if a file cannot be written, before the work and not after it.

    Args:
        path (`Path`): the file that will be written; not changed.
        inputs (`Iterable[Path]`, *optional*): the files that are read, which must not be overwritten.

    Raises:
        OSError: it cannot be written; the message says why.
        ValueError: it is one of the inputs, perhaps under another name.
    """
    target = _followed(path)
    _check_target(target)
    for file in inputs:
        if target.exists() and os.path.exists(file) and target.samefile(file):
            raise ValueError(
                f"{str(path)!r} is one of the inputs ({str(file)!r}) and would be overwritten. Choose another output "
                "file."
            )
    with errors_named(path), temporary_directory(target.parent):
        pass


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
