"""What a memory recites of its text, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from tokenizers.decoders import DecodeStream
from torch import Tensor

from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.serve.errors import api_errors
from gradmem_adapter.serve.limits import Limits
from gradmem_adapter.serve.memories import Memories
from gradmem_adapter.serve.openai import Tenant
from gradmem_adapter.serve.reads import unless_gone
from gradmem_adapter.serve.schemas import RecitalRequest
from gradmem_adapter.serve.streams import Tell, event_stream
from gradmem_adapter.serve.writes import WriteQueue
from gradmem_adapter.state import MemoryState


def recital_routes(memories: Memories, writes: WriteQueue, limits: Limits) -> APIRouter:
    """The routes for recitals.

    Args:
        memories (`Memories`): the memories of all tenants.
        writes (`WriteQueue`): the queue of WRITEs, where recitals wait as well: they take about as long.
        limits (`Limits`): the server's limits.
    """
    router = APIRouter(prefix="/v1/recitals")

    @router.post("")
    async def recital(body: RecitalRequest, request: Request, tenant: Tenant) -> Response:
        with api_errors():
            text, state = await run_in_threadpool(memories.segment, tenant, body.memory, body.segment)
        about = {"object": "recital", "memory": body.memory, "segment": body.segment}
        key = (tenant, "recital", body.memory, body.segment, body.max_tokens)
        writes.check_room(key)

        async def begin(tell: Tell) -> dict[str, Any]:
            work = writes.run(key, lambda check: _recite(memories.pipeline, text, state, body.max_tokens, check, tell))
            return about | await work

        if body.stream:
            return event_stream(begin, limits.grace)
        with api_errors():
            return JSONResponse(await unless_gone(request, begin(lambda piece: None)))

    return router


def _recite(
    pipeline: GradMemPipeline,
    text: str | None,
    state: MemoryState,
    most: int | None,
    check: Callable[[], None],
    tell: Tell,
) -> dict[str, Any]:
    """Decode one state greedily; each piece says whether its tokens are those of the text at the same position."""
    tokenizer, stream = pipeline.tokenizer, DecodeStream(skip_special_tokens=True)
    length = min(count for count in (int(state.context_tokens), pipeline.max_context_tokens, most) if count is not None)
    true: list[int | None] = [None] * length if text is None else tokenizer(text)["input_ids"]
    pieces: list[dict[str, Any]] = []
    right: list[bool] = []
    told = 0

    def decoded(token: Tensor) -> None:
        nonlocal told
        check()
        right.append(int(token) == true[len(right)])
        if piece := stream.step(tokenizer.backend_tokenizer, int(token)):  # None inside a character of several tokens
            pieces.append({"text": piece, "right": None if text is None else all(right[told:])})
            told = len(right)
            tell({"object": "recital.piece"} | pieces[-1])

    pipeline.model.reconstruct(state, length, callback=decoded)
    counts = {"tokens": length, "right_tokens": None if text is None else sum(right)}
    return counts | {"text": "".join(piece["text"] for piece in pieces), "pieces": pieces}
