"""WRITEs, one after the other, behind a bound."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from gradmem_adapter.serve.errors import ApiError
from gradmem_adapter.utils.wording import counted

T = TypeVar("T")
_RESTART = 10
"""Seconds after which a server that was stopped may run again."""


class NobodyWaitsError(Exception):
    """Whoever asked for a WRITE is gone."""


@dataclass(eq=False)
class _Job:
    key: Hashable
    cancelled: threading.Event
    ended: asyncio.Future[Any]
    """Done when the thread has done with it, and not before."""
    result: asyncio.Future[Any]
    """The same for who waits, and cancelled where nobody is to wait any longer."""
    waiting: int = 0

    def end(self) -> None:
        """Do not begin, or end at the next check; who waits does so no longer."""
        self.cancelled.set()
        self.result.cancel()


class WriteQueue:
    """Work of one thread, each piece of it once however many ask for it at the same time.

    Args:
        bound (`int`): pieces that are being worked on or wait.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._jobs: set[_Job] = set()
        """Those, too, for which nobody waits, until their thread has done with them."""
        self._thread = ThreadPoolExecutor(1, "gradmem-write")
        self._seconds = 1.0
        """That a piece takes, lately."""
        self._stopped = False

    def __len__(self) -> int:
        """How many pieces there are."""
        return len(self._jobs)

    async def run(self, key: Hashable, work: Callable[[Callable[[], None]], T]) -> T:
        """Wait for a piece of work. If all who wait are cancelled, it does not begin, or ends at its next check.

        Args:
            key (`Hashable`): the same for the same work.
            work (`Callable`): called with a function that raises when nobody waits any more.

        Raises:
            ApiError: there is too much to do.
        """
        job = self._waited_for(key)
        if job is None:
            self.check_room(key)
            job = self._begin(key, work)
        job.waiting += 1
        try:
            result: T = await asyncio.shield(job.result)
            return result
        except asyncio.CancelledError:
            if self._stopped:
                raise _stopping() from None
            raise
        finally:
            job.waiting -= 1
            if not job.waiting:
                job.end()

    def check_room(self, key: Hashable) -> None:
        """Raise `ApiError` where there is too much to do for one more piece, or no more is begun."""
        if self._stopped:
            raise _stopping()
        if len(self._jobs) >= self.bound and self._waited_for(key) is None:
            told = f"Being written or waiting for it: {counted(len(self._jobs), 'text')}. Ask again later."
            raise ApiError(429, told, "write_queue_full", retry_after=self._retry_after)

    async def wait(self, key: Hashable) -> None:
        """Wait until a piece of work has ended, if it is under way, whether or not somebody waits for what it gives."""
        if ended := [job.ended for job in self._jobs if job.key == key]:
            await asyncio.wait(ended)

    def _begin(self, key: Hashable, work: Callable[[Callable[[], None]], Any]) -> _Job:
        cancelled = threading.Event()
        future = self._thread.submit(self._work, work, cancelled)
        job = _Job(key, cancelled, ended=asyncio.wrap_future(future), result=asyncio.wrap_future(future))
        job.ended.add_done_callback(partial(self._forget, job))
        self._jobs.add(job)
        return job

    def _waited_for(self, key: Hashable) -> _Job | None:
        return next((job for job in self._jobs if job.key == key and not job.cancelled.is_set()), None)

    def _forget(self, job: _Job, ended: asyncio.Future[Any]) -> None:
        self._jobs.discard(job)
        if not ended.cancelled():
            ended.exception()  # looked at, or asyncio logs what `result` tells

    @property
    def _retry_after(self) -> int:
        return max(1, math.ceil(self._seconds * len(self._jobs)))

    def _work(self, work: Callable[[Callable[[], None]], Any], cancelled: threading.Event) -> Any:
        def check() -> None:
            if cancelled.is_set():
                raise NobodyWaitsError

        start = time.monotonic()
        try:
            check()
            return work(check)
        finally:
            self._seconds += 0.2 * (time.monotonic() - start - self._seconds)

    def stop(self) -> None:
        """Begin nothing more, let what is under way end at its next check, and tell who waits."""
        self._stopped = True
        for job in self._jobs:
            job.end()

    def close(self) -> None:
        """Wait for what is under way to end at its next check, and begin nothing more."""
        for job in list(self._jobs):  # which those that end leave meanwhile
            job.cancelled.set()
        self._thread.shutdown(cancel_futures=True)


def _stopping() -> ApiError:
    told = "The server is stopping. Send this again when it runs: what is stored of a text is not written anew."
    return ApiError(503, told, "server_stopping", retry_after=_RESTART)
