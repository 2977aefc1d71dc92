"""A store of bytes in a directory, which killed processes, full disks and several writers leave whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from langchain_core.stores import ByteStore

from gradmem_adapter.utils.files import open_regular, replacing

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
"""Names joined by slashes, none of which begins with a dot: no key leads out of the directory, or to half a file."""


class AtomicFileStore(ByteStore):
    """Bytes by key, each in a file of a directory, which is whole or not there at any moment.

    LangChain's `LocalFileStore` writes into its files, so that a killed process leaves half of one.

    ```python
    store = MemoryStateStore(AtomicFileStore("states"))
    ```

    Args:
        root (`str` or `PathLike`): the directory, which is made with the first key.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def _file(self, key: str) -> Path:
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ValueError(
                f"A key is made of letters, digits, _, - and . and may have several parts joined by /, none of which "
                f"begins with a dot; got {key!r}."
            )
        return self.root / key

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """The bytes of keys, None where there are none.

        Args:
            keys (`Sequence[str]`): of letters, digits, `_`, `-`, `.` and `/`.

        Raises:
            ValueError: a key of other characters.
            OSError: a file cannot be read.
        """
        return [self._read(file) for file in map(self._file, keys)]

    @staticmethod
    def _read(path: Path) -> bytes | None:
        try:
            with open_regular(path) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Put bytes in, each whole or not at all, in order.

        Args:
            key_value_pairs (`Sequence[tuple[str, bytes]]`): keys and their bytes.

        Raises:
            ValueError: a key of other characters; nothing is stored then.
            OSError: a file cannot be written: it stays as it was, and those before it are stored.
        """
        for file, data in [(self._file(key), data) for key, data in key_value_pairs]:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary:
                temporary.write_bytes(data)

    def mdelete(self, keys: Sequence[str]) -> None:
        """Delete keys; those that are not there are passed over.

        Args:
            keys (`Sequence[str]`): as for `mget`.

        Raises:
            ValueError: a key of other characters; nothing is deleted then.
        """
        for file in list(map(self._file, keys)):
            file.unlink(missing_ok=True)

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """The keys.

        Args:
            prefix (`str`, *optional*): only those that begin so.
        """
        start = (prefix or "").rpartition("/")[0]
        for folder, folders, files in os.walk(self.root / start if _KEY.fullmatch(start) else self.root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                key = (Path(folder) / name).relative_to(self.root).as_posix()
                if _KEY.fullmatch(key) and key.startswith(prefix or ""):
                    yield key
