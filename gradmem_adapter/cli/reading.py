"""Read a text or JSON lines from files and standard input."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

from gradmem_adapter.utils.files import decoded, decompressed, kind_of_no_text, read_text

STDIN = "-"
MAX_BYTES = 2**27
"""128 MiB: the most bytes of a text or of a line of JSON, each of which is read at once."""
HEAD_BYTES = 2**13
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def has_json_lines(path: str) -> bool:
    """Whether a file's name says that it holds JSON lines, gzipped or not."""
    return path.removesuffix(".gz").endswith((".jsonl", ".ndjson"))


def is_text(path: str) -> bool:
    """Whether a file seems to be a text, by Git's rule: no zero byte near its beginning. An empty file is not a text.

    UTF-16 counts as text here, so that reading it fails with an error that names the encoding.
    """
    try:
        with _opened(path) as stream:
            head = stream.read(HEAD_BYTES)
    except ValueError:
        return True
    return bool(head) and kind_of_no_text(head) is None and (b"\0" not in head or head.startswith(UTF16))


def whole(path: str) -> str:
    """The text of a file, or of standard input.

    Raises:
        OSError, ValueError: as for `read_text`.
    """
    if path != STDIN:
        return read_text(Path(path), max_bytes=MAX_BYTES)
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"Standard input has more than {MAX_BYTES:,} bytes, the limit. Split the text.")
    return decoded("Standard input", data)


def lines(path: str) -> Iterator[bytes]:
    """The lines of a file, or of standard input, read one at a time.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, or a line is too long.
    """
    with _opened(path) as stream:
        number = 0
        while line := stream.readline(MAX_BYTES + 1):
            number += 1
            if len(line) > MAX_BYTES:
                raise ValueError(f"{path}, line {number} has more than {MAX_BYTES:,} bytes, the limit. Split the text.")
            yield line


def _opened(path: str) -> AbstractContextManager[BinaryIO]:
    """A file, decompressed if it is gzipped, or standard input, opened for reading bytes."""
    return nullcontext(sys.stdin.buffer) if path == STDIN else decompressed(Path(path))
