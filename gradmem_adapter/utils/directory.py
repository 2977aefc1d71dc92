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

    A directory that is not there yet appears whole. In one that is there, files of the same names are replaced, what
    else of `own` an earlier save left, as its digests list it, goes, and all else stays. A process that is killed
    leaves the old files, or the new ones, of which those that are not in their places yet get there with the next
    `reading_together` or `replacing_together`.

    Args:
        path (`Path`): the directory.
        own (`Collection[str]`): the names that the files and folders may have.

    Raises:
        FileExistsError: a folder that no earlier save made would have to be replaced; nothing is changed then.
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
                _spare_folders(path, new)
                if (path / CARD).exists():
                    (new / CARD).unlink(missing_ok=True)
                new.rename(path / NEW)
                _finish(path, own)


@contextmanager
def reading_together(path: Path, own: Collection[str], unread: Collection[str] = ()) -> Iterator[None]:
    """Inside the block nobody replaces the files of a directory, and they are what they were saved as.

    Args:
        path (`Path`): the directory.
        own (`Collection[str]`): as `replacing_together` was given it.
        unread (`Collection[str]`, *optional*): those of them that nobody reads where the digests do not list them, so
            that somebody else's may be there.

    Raises:
        ValueError: a file is damaged, missing or of another save; a directory without digests is taken as it is.
        OSError: the files of a process that was killed are not in their places yet, and cannot be put there.
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
    """Write the digests of all files, which are on the disk then, and may be read by whom the umask lets."""
    lines = []
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / CARD)
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        lines.append(f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n")
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    for file in files:  # safetensors makes files that are their owner's alone
        file.chmod((folder / SUMS).stat().st_mode)


def _finish(path: Path, own: Collection[str]) -> None:
    """Put the files in `NEW` into their places, all that are left of them; the digests last."""
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
    """Raise `FileExistsError` if a folder in `new` would replace one that no save of ours made."""
    listed = _listed(path)
    for entry in new.iterdir():
        if entry.name not in listed and (path / entry.name).is_dir():
            raise FileExistsError(
                f"{str(path / entry.name)!r} exists, and {SUMS} does not list it as a part of an earlier save, so it "
                "is not replaced. Move it or choose another place."
            )


def _listed(path: Path) -> set[str]:
    """The files and folders in a directory that have digests; none where the digests are missing or damaged."""
    try:
        return {name.partition("/")[0] for name in _sums(path)}
    except (FileNotFoundError, ValueError):
        return set()


def missing(path: Path) -> list[str]:
    """The files that a directory's digests list and it does not have.

    Args:
        path (`Path`): the directory; one without digests misses nothing.
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
    """The digests by name; `ValueError` where the file is damaged."""
    lines = read_text(path / SUMS, max_bytes=2**20).splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64})  ([^\0]+)", line) for line in lines]
    sums = {match[2]: match[1] for match in found if match and not {"..", "/"} & set(Path(match[2]).parts)}
    if not sums or len(sums) != len(lines):
        raise ValueError(f"{path / SUMS} is damaged: it is no list of SHA-256 digests and names.")
    return sums


def _check(path: Path, own: Collection[str], unread: Collection[str]) -> None:
    for entry in map(path.joinpath, own):
        if entry.exists() and not (entry.is_file() or entry.is_dir()):
            raise ValueError(f"{str(entry)!r} is no regular file but a device, a pipe or a socket, and is not read.")
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
            wrong.append(f"{name} is not what was saved")
    if wrong:
        raise ValueError(
            f"The files in {str(path)!r} are damaged or do not belong together: {', '.join(wrong)}. Get them anew; or, "
            f"if you changed them yourself, delete {SUMS}, which holds the digests that they were saved with."
        )
