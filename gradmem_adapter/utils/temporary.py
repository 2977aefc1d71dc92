"""Folders for what is not yet whole, which no killed process leaves behind for good."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is swept
    fcntl = None  # type: ignore[assignment]

PREFIX = ".gradmem-temporary-"


@contextmanager
def temporary_directory(parent: Path) -> Iterator[Path]:
    """An empty folder in `parent` for this process alone, which goes when the block ends.

    Folders of processes that were killed are removed first. The name has the process's number, for people; whether the
    process lives is told by a lock on the folder, which the system releases however a process ends, and which holds
    between containers too, where numbers mean nothing.

    Args:
        parent (`Path`): an existing directory; what is in the folder can be renamed into it.

    Raises:
        OSError: the folder cannot be made.
    """
    sweep(parent)
    folder, lock = _make(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _make(parent: Path) -> tuple[Path, int | None]:
    """A new folder and the lock on it; None where the file system has no locks."""
    while True:
        folder = parent / f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex}"
        folder.mkdir(mode=0o700)
        try:
            lock = _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process is sweeping it, which found it before it was locked
        if folder.is_dir():
            return folder, lock
        if lock is not None:
            os.close(lock)


@contextmanager
def locked(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Inside the block no other process or thread holds the lock on a folder.

    Args:
        folder (`Path`): an existing one. Where the file system has no locks, nobody is kept out.
        shared (`bool`, *optional*, defaults to `False`): others may share it.
        wait (`bool`, *optional*, defaults to `True`): until nobody else holds it.

    Raises:
        BlockingIOError: somebody else holds it, and is not waited for.
    """
    lock = _lock(folder, shared=shared, wait=wait)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, shared: bool = False, wait: bool = False) -> int | None:
    """An open descriptor of the folder that holds its lock; None where there are no locks.

    Raises:
        BlockingIOError: another process holds it, and is not waited for.
        FileNotFoundError: the folder is gone.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def sweep(parent: Path) -> None:
    """Remove the temporary folders of processes that are no more; what cannot be listed or opened stays.

    Args:
        parent (`Path`): the directory they are in.
    """
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            lock = None if folder.is_symlink() else _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
