"""Where a checkpoint is: a directory, one that ships, or on the hub, from which its own files are downloaded."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from gradmem_adapter.utils.directory import SUMS, missing
from gradmem_adapter.utils.shipped import names_shipped, shipped


def found(path: str | Path, patterns: Iterable[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """The directory of a checkpoint, downloaded unless it is cached.

    Args:
        path (`str` or `Path`): as for `load_checkpoint`.
        patterns (`Iterable[str]`): patterns of the files that a checkpoint may have. Other files that its digests list,
            such as those of rare tokenizers, are downloaded too.
        revision (`str`, *optional*): a branch, a tag or a commit; not with a directory or a name that has one.
        token (`str`, *optional*): of the hub.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the revision cannot be meant.
    """
    name = str(path)
    directory = shipped(name) or Path(name)
    if "@" in name and not directory.is_dir():
        name, _, named = name.partition("@")
        if not (name and named):
            raise ValueError(f"{str(path)!r} is neither a directory nor of the form owner/name@revision.")
        if revision is not None:
            raise ValueError(f"{str(path)!r} names a revision, and so does revision={revision!r}. Leave one out.")
        directory, revision = shipped(name) or Path(name), named
    if directory.is_dir() and revision is not None:
        raise ValueError(
            f"A revision applies only to a repository on the hub, but {name!r} is the directory {str(directory)!r}. "
            "Leave the revision out, or run from a directory without that name."
        )
    if directory.is_dir():
        return directory
    try:
        return _downloaded(name, patterns, revision=revision, token=token)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"There is no checkpoint {str(path)!r}: it is not a directory, not a shipped checkpoint "
            f"({', '.join(names_shipped())}), and not a repository on the hub ({error})."
        ) from error


def _downloaded(name: str, patterns: Iterable[str], *, revision: str | None, token: str | None) -> Path:
    """The directory of that commit of a repository."""
    wanted = [SUMS, *patterns]
    folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=wanted))
    if others := missing(folder):
        wanted += map(glob.escape, others)
        folder = Path(snapshot_download(name, revision=folder.name, token=token, allow_patterns=wanted))
    return folder
