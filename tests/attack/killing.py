"""Processes that start in milliseconds and are killed at a random moment or at a given one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["gradmem_adapter", "gradmem_adapter.store"])
CALLS = ("rename", "replace", "mkdir", "rmdir", "unlink")
"""What changes a directory."""


def kill_often(job: Callable[..., None], *args: Any, kills: int, longest: float, seed: int = 0) -> Iterator[int]:
    """Kill many processes that do an endless job, and yield the number of each after its kill.

    Args:
        job: a function of a module, given another to call when it is ready to be killed.
        args: what else it is given.
        kills: how many.
        longest: seconds after which a process that is ready is killed at the latest.
    """
    dice = random.Random(seed)
    for i in range(kills):
        ours, theirs = SERVER.Pipe()
        process = SERVER.Process(target=_endless, args=(theirs, job, args))
        process.start()
        assert ours.recv() == "ready"
        time.sleep(dice.uniform(0, longest))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the job failed by itself"
        yield i


def _endless(ready: Any, job: Callable[..., None], args: tuple[Any, ...]) -> None:
    job(lambda: ready.send("ready"), *args)


def kill_at_every_call(job: Callable[..., None], *args: Any) -> Iterator[int]:
    """Kill processes before the first, second, ... call that changes a directory, until one reaches its end."""
    for count in itertools.count(1):
        process = SERVER.Process(target=_until, args=(count, job, args))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), "the job failed by itself"
        yield count
        if process.exitcode == 0:
            return


def _until(count: int, job: Callable[..., None], args: tuple[Any, ...]) -> None:
    calls = itertools.count(1)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    job(*args)
