"""Directories whose files are replaced all together or not at all, and are read together."""

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
"""A subfolder with complete new files that have not all been moved into place yet."""
SUMS = "SHA256SUMS"
"""The file with the digests of the files that belong together, in the format of `sha256sum --check`."""
CARD = "README.md"
"""Users may edit it, so it has no digest, and an existing one is kept."""


@contextmanager
def replacing_together(path: Path, own: Collection[str]) -> Iterator[Path]:
    """Yields an empty folder to fill; when the block ends, its files are moved into the directory `path` together.

    A new directory appears only when it is complete. In an existing one, files of the same names are replaced, other
    files in `own` from an earlier save (those that its digests list) are removed, and everything else stays. A killed
    process leaves either the old files or the new ones; the next `reading_together` or `replacing_together` moves the
    rest of the new files into place.

    Args:
        path (`Path`): the directory.
        own (`Collection[str]`): the names that the files and folders may have.

    Raises:
        FileExistsError: a folder that was not made by an earlier save would be replaced; nothing is changed.
        OSError: the directory cannot be written; nothing is changed.
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
                _spare_folders(path, new)
                if (path / CARD).exists():
                    (new / CARD).unlink(missing_ok=True)
                new.rename(path / NEW)
                _finish(path, own)


@contextmanager
def reading_together(path: Path, own: Collection[str], unread: Collection[str] = ()) -> Iterator[None]:
    """In the block, the files of a directory match their digests, and no other process replaces them.

    Args:
        path (`Path`): the directory.
        own (`Collection[str]`): the same as for `replacing_together`.
        unread (`Collection[str]`, *optional*): the names in `own` that are not read unless the digests list them, so
            files of others may have them.

    Raises:
        ValueError: a file is damaged, missing or from another save. A directory without digests is not checked.
        OSError: files left by a killed process cannot be moved into place.
    """
    while True:
        with locked(path, shared=True):
            if not (path / NEW).exists():
                _check(path, own, unread)
                yield
                return
        with errors_named(path), locked(path):
            _finish(path, own)


def _seal(folder: Path) -> None:
    """Flush all files to disk, write their digests, and give them the permissions of the umask."""
    lines = []
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / CARD)
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        lines.append(f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n")
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    for file in files:  # safetensors creates files that only their owner can read
        file.chmod((folder / SUMS).stat().st_mode)


def _finish(path: Path, own: Collection[str]) -> None:
    """Move the remaining files in `NEW` into place, the digests last."""
    new = path / NEW
    if not new.is_dir():
        return
    if (new / SUMS).is_file():
        for name in _listed(path) & set(own) - _listed(new) - {SUMS}:
            if os.path.lexists(path / name):
                _remove(path / name)
        for entry in sorted(new.iterdir(), key=lambda entry: entry.name == SUMS):
            if (path / entry.name).is_dir():
                _remove(path / entry.name)
            entry.replace(path / entry.name)
    new.rmdir()


def _spare_folders(path: Path, new: Path) -> None:
    """Raise `FileExistsError` if a folder in `new` would replace one that was not made by an earlier save."""
    listed = _listed(path)
    for entry in new.iterdir():
        if entry.name not in listed and (path / entry.name).is_dir():
            raise FileExistsError(
                f"{str(path / entry.name)!r} exists, but {SUMS} does not list it as part of an earlier save, so it is "
                "not replaced. Move it, or choose another directory."
            )


def _listed(path: Path) -> set[str]:
    """The files and folders in a directory that have digests; none if the digests are missing or damaged."""
    try:
        return {name.partition("/")[0] for name in _sums(path)}
    except (FileNotFoundError, ValueError):
        return set()


def missing(path: Path) -> list[str]:
    """The files that a directory's digests list but that do not exist.

    Args:
        path (`Path`): the directory; without digests the result is empty.
    """
    try:
        return [name for name in _sums(path) if not (path / name).exists()]
    except (FileNotFoundError, ValueError):
        return []


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _sums(path: Path) -> dict[str, str]:
    """The digests by file name; `ValueError` if the file of digests is damaged."""
    lines = read_text(path / SUMS, max_bytes=2**20).splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64})  ([^\0]+)", line) for line in lines]
    sums = {match[2]: match[1] for match in found if match and not {"..", "/"} & set(Path(match[2]).parts)}
    if not sums or len(sums) != len(lines):
        raise ValueError(f"{path / SUMS} is damaged: it is not a list of SHA-256 digests and file names.")
    return sums


def _check(path: Path, own: Collection[str], unread: Collection[str]) -> None:
    for entry in map(path.joinpath, own):
        if entry.exists() and not (entry.is_file() or entry.is_dir()):
            raise ValueError(f"{str(entry)!r} is a device, a pipe or a socket; expected a regular file.")
    if not (path / SUMS).exists():
        return
    sums = _sums(path)
    kept = {name.partition("/")[0] for name in sums}
    new = sorted(set(own) - set(unread) - kept)
    wrong = [f"{name} is not in {SUMS}" for name in new if (path / name).exists()]
    for name, digest in sums.items():
        if not (path / name).exists():
            wrong.append(f"{name} is missing")
        elif sha256(path / name) != digest:
            wrong.append(f"{name} has changed since it was saved")
    if wrong:
        raise ValueError(
            f"The files in {str(path)!r} are damaged or do not belong together: {', '.join(wrong)}. Get them again. If "
            f"you changed them on purpose, delete {SUMS}, which holds their original digests."
        )
