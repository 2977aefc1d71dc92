"""Which states the threads of a process are writing, so that each state is written once."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Claims:
    """The keys that threads of this process are working on."""

    def __init__(self) -> None:
        self._events: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, keys: Iterable[str]) -> Iterator[list[str]]:
        """Claim keys for this thread and yield those that no other thread holds. On leaving the block, wait until the
        other threads have released theirs.

        Args:
            keys (`Iterable[str]`): the keys to work on. Another thread may have failed on those that it held.
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
