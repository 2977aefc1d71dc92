"""The server as an ASGI app."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool

from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.serve.errors import add_handlers
from gradmem_adapter.serve.limits import Limits
from gradmem_adapter.serve.memories import Memories
from gradmem_adapter.serve.metrics import Counting, Metrics
from gradmem_adapter.serve.openai import openai_routes
from gradmem_adapter.serve.page import page_routes
from gradmem_adapter.serve.reads import Reads
from gradmem_adapter.serve.recitals import recital_routes
from gradmem_adapter.serve.routes import memory_routes
from gradmem_adapter.serve.tenants import Gate, Tenants
from gradmem_adapter.serve.writes import WriteQueue


def create_app(
    pipeline: GradMemPipeline,
    store: Path,
    *,
    model: str = "gradmem",
    tenants: Tenants | None = None,
    limits: Limits | None = None,
    segment_tokens: int | None = None,
    host: str = "127.0.0.1",
) -> FastAPI:
    """Memories and answers over HTTP.

    Args:
        pipeline (`GradMemPipeline`): what writes, and what answers through its reader.
        store (`Path`): the folder of the memory store; those of tenants are in folders inside it.
        model (`str`, *optional*, defaults to `"gradmem"`): the model name that clients use.
        tenants (`Tenants`, *optional*): who may use the server; None: everyone on this machine.
        limits (`Limits`, *optional*): its limits.
        segment_tokens (`int`, *optional*): the most tokens in a segment; None: as for `pipeline.segments`.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): the address that it listens on.
    """
    tenants, limits, metrics = tenants or Tenants(), limits or Limits(), Metrics()
    memories, writes = Memories(pipeline, store, metrics, segment_tokens), WriteQueue(limits.writes)
    reads = Reads(pipeline, memories, limits, metrics)
    metrics.gauge("gradmem_writes_waiting", "Texts being written or waiting to be.", lambda: len(writes))
    metrics.gauge("gradmem_reads_waiting", "Prompts being answered or waiting to be.", lambda: len(reads))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        reads.close()
        await run_in_threadpool(writes.close)

    # Without FastAPI's documentation pages, which load scripts from other sites.
    app = FastAPI(title="gradmem", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.writes = writes
    add_handlers(app)
    app.include_router(openai_routes(reads, model))
    app.include_router(memory_routes(memories, writes, limits))
    app.include_router(recital_routes(memories, writes, limits))
    app.include_router(page_routes())

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok"}

    @app.get("/metrics")
    def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    hosts = {"localhost", "127.0.0.1", "::1", host}
    app.add_middleware(Gate, tenants=tenants, body_bytes=limits.body_bytes, hosts=hosts)
    app.add_middleware(Counting, metrics=metrics)
    return app


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
