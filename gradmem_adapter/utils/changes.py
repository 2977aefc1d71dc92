"""Whether a model was changed while something was computed with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Changes:
    """Counts the changes that are made to a model's adapters, one after the other. A copy begins anew."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant: to delete an adapter makes another the active one
        self._begun = self._done = 0

    def __reduce__(self) -> tuple[type[Changes], tuple[()]]:
        return Changes, ()

    def begin(self, *_: Any) -> None:
        """A change begins; takes any arguments, as hooks are given some."""
        with self._lock:
            self._begun += 1

    def end(self, *_: Any) -> None:
        """A change is done."""
        with self._lock:
            self._done += 1

    @contextmanager
    def one(self) -> Iterator[None]:
        """A change is made inside; other threads wait with theirs."""
        with self._lock:
            self.begin()
            try:
                yield
            finally:
                self.end()

    @property
    def number(self) -> tuple[int, int]:
        """Another one after each change, and two that differ while one is made."""
        return self._begun, self._done
