"""Metrics for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server. They name no tenant."""

    def __init__(self) -> None:
        self._registry = all_ = CollectorRegistry()
        ProcessCollector(registry=all_)
        self.requests = Counter("gradmem_requests", "Answered requests.", ["path", "status"], registry=all_)
        self.seconds = Histogram(
            "gradmem_request_seconds", "Seconds until the end of a response.", ["path"], buckets=_SECONDS, registry=all_
        )
        self.batch = Histogram("gradmem_read_batch", "Prompts in a batch.", buckets=(1, 2, 4, 8, 16, 32), registry=all_)
        self.prompt_tokens = Counter("gradmem_prompt_tokens", "Tokens and memory vectors of prompts.", registry=all_)
        self.new_tokens = Counter("gradmem_new_tokens", "Tokens of answers.", registry=all_)
        self.written = Counter("gradmem_written_states", "Memory states that were written.", registry=all_)

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Add a metric whose value a function returns."""
        Gauge(name, what, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All metrics, in Prometheus's format."""
        return generate_latest(self._registry)


class Counting:
    """Middleware that counts requests and measures how long they take."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            path = getattr(scope.get("route"), "path", "other")  # routes, not paths: few label values
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)
