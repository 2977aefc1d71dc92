"""Directories of which several files are replaced together, or none of them, and read together."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from gradmem_adapter.utils.files import errors_named, read_text, sha256
from gradmem_adapter.utils.temporary import locked, sweep, temporary_directory

NEW = ".gradmem-new"
"""In a directory: files that are whole, of which not all are in their places yet."""
SUMS = "SHA256SUMS"
"""In a directory: the digests of the files that belong together, as `sha256sum --check` reads them."""
CARD = "README.md"
"""Belongs to its reader: it has no digest, and one that is there stays."""


@contextmanager
def replacing_together(path: Path, own: Collection[str]) -> Iterator[Path]:
    """A new folder to fill, whose files take their places in the directory `path` together when the block ends.

    A directory that is not there yet appears whole. In one that is there, what is named in `own` is replaced or goes,
    and all else stays. A process that is killed leaves the old files, or the new ones, of which those that are not in
    their places yet get there with the next `reading_together` or `replacing_together`.

    Args:
        path (`Path`): the directory.
        own (`Collection[str]`): the names that the files and folders may have.

    Raises:
        OSError: it cannot be written; nothing is changed then.
    """
    path = Path(os.path.realpath(path))
    with errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with temporary_directory(path if path.is_dir() else path.parent) as folder:
            new = folder / "new"
            new.mkdir()
            yield new
            _seal(new)
            if not path.is_dir():
                try:
                    new.rename(path)
                    return
                except OSError:
                    if not path.is_dir():  # otherwise another process was faster
                        raise
            with locked(path):
                _finish(path, own)
                if (path / CARD).exists():
                    (new / CARD).unlink(missing_ok=True)
                new.rename(path / NEW)
                _finish(path, own)


@contextmanager
def reading_together(path: Path, own: Collection[str]) -> Iterator[None]:
    """Inside the block nobody replaces the files of a directory, and they are what they were saved as.

    Args:
        path (`Path`): the directory.
        own (`Collection[str]`): as `replacing_together` was given it.

    Raises:
        ValueError: a file is damaged, missing or of another save; a directory without digests is taken as it is.
        OSError: the files of a process that was killed are not in their places yet, and cannot be put there.
    """
    while True:
        with locked(path, shared=True):
            if not (path / NEW).exists():
                _check(path, own)
                yield
                return
        with errors_named(path), locked(path):
            _finish(path, own)


def _seal(folder: Path) -> None:
    """Write the digests of all files, which are on the disk then."""
    lines = []
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / CARD):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        lines.append(f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n")
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def _finish(path: Path, own: Collection[str]) -> None:
    """Put the files in `NEW` into their places, all that are left of them; the digests last."""
    new = path / NEW
    if not new.is_dir():
        return
    if (new / SUMS).is_file():
        kept = {SUMS, *(name.partition("/")[0] for name in _sums(new))}
        for entry in list(path.iterdir()):
            if entry.name in own and entry.name not in kept:
                _remove(entry)
        for entry in sorted(new.iterdir(), key=lambda entry: entry.name == SUMS):
            if (path / entry.name).is_dir():
                _remove(path / entry.name)
            entry.replace(path / entry.name)
    new.rmdir()


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _sums(path: Path) -> dict[str, str]:
    """The digests by name; `ValueError` where the file is damaged."""
    lines = read_text(path / SUMS, max_bytes=2**20).splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64})  ([^\0]+)", line) for line in lines]
    sums = {match[2]: match[1] for match in found if match and not {"..", "/"} & set(Path(match[2]).parts)}
    if not sums or len(sums) != len(lines):
        raise ValueError(f"{path / SUMS} is damaged: it is no list of SHA-256 digests and names.")
    return sums


def _check(path: Path, own: Collection[str]) -> None:
    for entry in map(path.joinpath, own):
        if entry.exists() and not (entry.is_file() or entry.is_dir()):
            raise ValueError(f"{str(entry)!r} is no regular file but a device, a pipe or a socket, and is not read.")
    if not (path / SUMS).exists():
        return
    sums = _sums(path)
    kept = {name.partition("/")[0] for name in sums}
    wrong = [f"{name} is not in {SUMS}" for name in sorted(own) if name not in kept and (path / name).exists()]
    for name, digest in sums.items():
        if not (path / name).exists():
            wrong.append(f"{name} is missing")
        elif sha256(path / name) != digest:
            wrong.append(f"{name} is not what was saved")
    if wrong:
        raise ValueError(
            f"The files in {str(path)!r} are damaged or do not belong together: {', '.join(wrong)}. Get them anew; or, "
            f"if you changed them yourself, delete {SUMS}, which holds the digests that they were saved with."
        )
