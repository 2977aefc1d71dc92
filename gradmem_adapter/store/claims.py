"""Which states the threads of a process are writing, so that each is written once."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Claims:
    """Keys that threads are at work on."""

    def __init__(self) -> None:
        self._events: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, keys: Iterable[str]) -> Iterator[list[str]]:
        """The keys that are this thread's inside the block. Behind it, the other threads have done with theirs.

        Args:
            keys (`Iterable[str]`): what is to be worked on. What another thread has may have failed there.
        """
        keys, done = list(keys), threading.Event()
        with self._lock:
            others = {key: self._events[key] for key in keys if key in self._events}
            mine = [key for key in keys if key not in others]
            self._events |= dict.fromkeys(mine, done)
        try:
            yield mine
        finally:
            with self._lock:
                for key in mine:
                    del self._events[key]
            done.set()
        for event in others.values():
            event.wait()
