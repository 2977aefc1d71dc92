"""Whether a model was changed while something was computed with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Changes:
    """Counts the changes that are made to a model's adapters, one after the other. A copy begins anew."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant: to delete an adapter makes another the active one
        self._begun = self._done = 0
        self._loading: set[int] = set()
        """Threads that load weights. PyTorch calls no hook where loading fails, or is interrupted."""

    def __reduce__(self) -> tuple[type[Changes], tuple[()]]:
        return Changes, ()

    def begin_loading(self, *_: Any) -> None:
        """Weights are loaded from here on; takes any arguments, as hooks are given some."""
        with self._lock:
            self.end_loading()
            self._loading.add(threading.get_ident())
            self._begun += 1

    def end_loading(self, *_: Any) -> None:
        """They are loaded, or this thread does something else and loading has failed."""
        with self._lock:
            if threading.get_ident() in self._loading:
                self._loading.remove(threading.get_ident())
                self._done += 1

    @contextmanager
    def one(self, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """A change is made inside; other threads wait with theirs.

        Args:
            unless (`Callable`, *optional*): says that what is done inside changes nothing. It then does not count.
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
        """Another one after each change, and two that differ while one is made."""
        self.end_loading()
        return self._begun, self._done
