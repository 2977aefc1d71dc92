"""Memories over HTTP."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from gradmem_adapter.serve.errors import ApiError, api_errors
from gradmem_adapter.serve.limits import Limits
from gradmem_adapter.serve.memories import Memories
from gradmem_adapter.serve.openai import Tenant
from gradmem_adapter.serve.reads import unless_gone
from gradmem_adapter.serve.schemas import MemoryRequest
from gradmem_adapter.serve.streams import Tell, event_stream
from gradmem_adapter.serve.writes import WriteQueue
from gradmem_adapter.utils.files import decoded
from gradmem_adapter.utils.state_file import MemoryStateError
from gradmem_adapter.utils.wording import counted
from gradmem_adapter.write.options import WriteOptions

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": MemoryRequest.model_json_schema()},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
            },
        },
    }
}


async def _memory_request(request: Request) -> MemoryRequest:
    """The text to write, from JSON or from a form with a file."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            return MemoryRequest.model_validate_json(await request.body())
        if kind == "multipart/form-data":
            async with request.form(max_files=1, max_fields=8) as form:
                fields: dict[str, Any] = dict(form)
                for name, value in fields.items():
                    if isinstance(value, UploadFile) != (name == "file"):
                        told = f"Send a file in the field file, as with curl -F file=@report.txt: got {name!r}"
                        told += " without a file." if name == "file" else " with a file."
                        raise ApiError(400, told, param=name[:80])
                if (file := fields.pop("file", None)) is not None:
                    with api_errors():
                        text = decoded("The file", await file.read())
                    if not text:
                        raise ApiError(400, f"file: {file.filename!r} is empty. Send a file with text.", param="file")
                    fields = {"name": file.filename} | fields | {"text": text}
                return MemoryRequest(**fields)
    except ValidationError as error:
        raise RequestValidationError([one | {"loc": ("body", *one["loc"])} for one in error.errors()]) from error
    raise ApiError(415, "Send JSON (application/json) or a form with a file (multipart/form-data).")


async def _write(memories: Memories, writes: WriteQueue, limits: Limits, request: Request, tenant: str) -> Response:
    """The memory of a text, which is written first unless it is stored; as a stream or at once."""
    body = await _memory_request(request)
    if (body.steps or 0) > limits.write_steps:
        raise ApiError(
            400,
            f"This server writes a text in at most {counted(limits.write_steps, 'write step')}, got {body.steps:,}.",
            param="steps",
        )
    options = WriteOptions(steps=body.steps, lr=body.lr)
    identity = await run_in_threadpool(memories.id_of, tenant, body.text, options)
    found = None
    with suppress(ApiError, MemoryStateError):  # not stored, or damaged
        found = await run_in_threadpool(memories.describe, tenant, identity)
    key = (tenant, identity, body.fidelity)
    there = found is not None and (not body.fidelity or found["fidelity"] is not None)
    if not there:
        memories.check_cuts()
        writes.check_room(key)

    async def begin(tell: Tell | None = None) -> dict[str, Any]:
        if found is None or not there:
            told = await writes.run(
                key, lambda check: memories.write(tenant, body.text, body.name, options, body.fidelity, check, tell)
            )
        else:
            told = found
        if body.name in (None, told["name"]):
            return told
        return await run_in_threadpool(memories.rename, tenant, identity, body.name)

    if body.stream:
        return event_stream(begin, limits.grace)
    with api_errors():
        return JSONResponse(await unless_gone(request, begin()))


def memory_routes(memories: Memories, writes: WriteQueue, limits: Limits) -> APIRouter:
    """The routes that write, show and delete memories."""
    router = APIRouter(prefix="/v1/memories")

    @router.post("", openapi_extra=_BODY)
    async def write(request: Request, tenant: Tenant) -> Response:
        return await _write(memories, writes, limits, request, tenant)

    @router.get("")
    async def some(
        tenant: Tenant, limit: Annotated[int, Query(ge=1, le=1000)] = 100, after: str | None = None
    ) -> dict[str, Any]:
        with api_errors():
            found, more = await run_in_threadpool(memories.page, tenant, limit, after)
        return {"object": "list", "data": found, "has_more": more}

    @router.get("/{identity:path}")
    async def one(identity: str, tenant: Tenant, text: bool = False) -> dict[str, Any]:
        with api_errors():
            return await run_in_threadpool(memories.describe, tenant, identity, text)

    @router.delete("/{identity:path}")
    async def delete(identity: str, tenant: Tenant) -> dict[str, Any]:
        for fidelity in (False, True):
            await writes.wait((tenant, identity, fidelity))
        with api_errors():
            await run_in_threadpool(memories.delete, tenant, identity)
        return {"id": identity, "object": "memory.deleted", "deleted": True}

    return router
