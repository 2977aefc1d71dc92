"""Detects whether a model was changed during a computation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Changes:
    """Counts changes to a model's adapters, and lets only one be made at a time. A copy starts from zero."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant: deleting an adapter activates another
        self._begun = self._done = 0
        self._loading: set[int] = set()
        """Threads that are loading weights. PyTorch calls no hook if loading fails or is interrupted."""

    def __reduce__(self) -> tuple[type[Changes], tuple[()]]:
        return Changes, ()

    def begin_loading(self, *_: Any) -> None:
        """Call before weights are loaded. Takes any arguments, as it serves as a hook."""
        with self._lock:
            self.end_loading()
            self._loading.add(threading.get_ident())
            self._begun += 1

    def end_loading(self, *_: Any) -> None:
        """Call when weights are loaded, or when this thread does something else because loading failed."""
        with self._lock:
            if threading.get_ident() in self._loading:
                self._loading.remove(threading.get_ident())
                self._done += 1

    @contextmanager
    def one(self, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Make a change in the block; other threads wait with theirs.

        Args:
            unless (`Callable`, *optional*): if it returns True, the block changes nothing and does not count.
        """
        with self._lock:
            if unless():
                yield
                return
            self._begun += 1
            try:
                yield
            finally:
                self._done += 1

    @property
    def number(self) -> tuple[int, int]:
        """Differs after each change; its two numbers differ from each other during a change."""
        self.end_loading()
        return self._begun, self._done
