"""Progress of long work as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import anyio
from sse_starlette import EventSourceResponse

from gradmem_adapter.serve.errors import api_error

Tell: TypeAlias = Callable[[dict[str, Any]], None]
"""Called from any thread with an event for the client."""


def event_stream(begin: Callable[[Tell], Awaitable[dict[str, Any]]], grace: float) -> EventSourceResponse:
    """The events of some work, then its result or its error, then `[DONE]`. A client that disconnects cancels the work.

    Args:
        begin (`Callable`): begins the work, given a function to call with events.
        grace (`float`): seconds that the work has to finish when the server is stopped.
    """
    return EventSourceResponse(_events(begin), sep="\n", shutdown_event=anyio.Event(), shutdown_grace_period=grace)


async def _events(begin: Callable[[Tell], Awaitable[dict[str, Any]]]) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def tell(event: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(told.put_nowait, event)

    work = asyncio.ensure_future(begin(tell))
    work.add_done_callback(lambda _: told.put_nowait(None))
    try:
        while (event := await told.get()) is not None:
            yield json.dumps(event)
        yield json.dumps(work.result())
    except Exception as error:
        yield json.dumps(api_error(error).body)
    finally:
        work.cancel()
    yield "[DONE]"
