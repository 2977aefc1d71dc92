"""Temporary folders for incomplete files, cleaned up even after a process was killed."""

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
    """An empty folder in `parent` for this process only, removed when the block ends.

    Folders of killed processes are removed first. The name contains the process id, for people only. A lock on the
    folder shows whether its process is alive: the system releases it however the process ends, and it works across
    containers, where process ids do not.

    Args:
        parent (`Path`): an existing directory; files in the folder can be renamed into it.

    Raises:
        OSError: the folder cannot be created.
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
    """A new folder and the lock on it; the lock is None if the file system has no locks."""
    while True:
        folder = parent / f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex}"
        folder.mkdir(mode=0o700)
        try:
            lock = _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process found it before it was locked, and is sweeping it
        if folder.is_dir():
            return folder, lock
        if lock is not None:
            os.close(lock)


@contextmanager
def locked(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold the lock on a folder in the block.

    Args:
        folder (`Path`): an existing folder. If the file system has no locks, others are not kept out.
        shared (`bool`, *optional*, defaults to `False`): share the lock with others that also set this.
        wait (`bool`, *optional*, defaults to `True`): wait until the lock is free.

    Raises:
        BlockingIOError: another process or thread holds the lock, and `wait` is False.
    """
    lock = _lock(folder, shared=shared, wait=wait)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, shared: bool = False, wait: bool = False) -> int | None:
    """An open file descriptor of the folder that holds its lock; None if there are no locks.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
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
    """Remove the temporary folders of processes that have ended, except those that cannot be opened."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            lock = None if folder.is_symlink() else _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
