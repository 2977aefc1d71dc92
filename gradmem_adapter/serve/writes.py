"""A bounded queue of WRITEs, which run one after the other."""

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
"""Seconds after which clients of a stopping server should try again."""


class NobodyWaitsError(Exception):
    """All clients that asked for a WRITE have disconnected."""


@dataclass(eq=False)
class _Job:
    key: Hashable
    cancelled: threading.Event
    ended: asyncio.Future[Any]
    """Done only when the thread has finished with the job."""
    result: asyncio.Future[Any]
    """What clients wait for: done with `ended`, or cancelled earlier if nobody is to wait any longer."""
    waiting: int = 0

    def end(self) -> None:
        """Cancel the job: it does not begin, or ends at its next check, and clients stop waiting now."""
        self.cancelled.set()
        self.result.cancel()


class WriteQueue:
    """Jobs for one thread. A job that several clients ask for at the same time runs once.

    Args:
        bound (`int`): the most jobs running or waiting.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._jobs: set[_Job] = set()
        """All jobs until the thread has finished with them, even if nobody waits for them any more."""
        self._thread = ThreadPoolExecutor(1, "gradmem-write")
        self._seconds = 1.0
        """Moving average of how long a job takes."""
        self._stopped = False

    def __len__(self) -> int:
        """The number of jobs running or waiting."""
        return len(self._jobs)

    async def run(self, key: Hashable, work: Callable[[Callable[[], None]], T]) -> T:
        """Run a job and wait for it. If everyone waiting is cancelled, it does not begin, or ends at its next check.

        Args:
            key (`Hashable`): identifies the job: equal keys share one run.
            work (`Callable`): called with a function that raises when nobody waits any more.

        Raises:
            ApiError: the queue is full, or the server is stopping.
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
        """Raise `ApiError` if the queue is full, or if the server is stopping."""
        if self._stopped:
            raise _stopping()
        if len(self._jobs) >= self.bound and self._waited_for(key) is None:
            told = f"The server is busy: {counted(len(self._jobs), 'text')} being written or waiting. Try again later."
            raise ApiError(429, told, "write_queue_full", retry_after=self._retry_after)

    async def wait(self, key: Hashable) -> None:
        """Wait until a job has ended, if it is in the queue, even if it was cancelled."""
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
            ended.exception()  # retrieved, or asyncio would log an exception that `result` reports

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
        """Accept no more jobs, end the running one at its next check, and tell waiting clients."""
        self._stopped = True
        for job in self._jobs:
            job.end()

    def close(self) -> None:
        """Begin no more jobs, and wait for the running one to end at its next check."""
        for job in list(self._jobs):  # a copy: jobs that end leave the set
            job.cancelled.set()
        self._thread.shutdown(cancel_futures=True)


def _stopping() -> ApiError:
    told = "The server is stopping. Send this again after its restart: stored segments are not written again."
    return ApiError(503, told, "server_stopping", retry_after=_RESTART)
