"""Download only a checkpoint's files from a repository on the hub."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download

from gradmem_adapter.utils.directory import SUMS, missing


def snapshot(name: str, patterns: Iterable[str], *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a checkpoint unless it is cached.

    Args:
        name (`str`): the repository.
        patterns (`Iterable[str]`): patterns of the files that a checkpoint may have. Other files that its digests list,
            such as those of rare tokenizers, are downloaded too.
        revision (`str`, *optional*): a branch, a tag or a commit.
        token (`str`, *optional*): of the hub.

    Returns:
        `Path`: the directory of that commit.
    """
    wanted = [SUMS, *patterns]
    folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=wanted))
    if others := missing(folder):
        wanted += map(glob.escape, others)
        folder = Path(snapshot_download(name, revision=folder.name, token=token, allow_patterns=wanted))
    return folder
