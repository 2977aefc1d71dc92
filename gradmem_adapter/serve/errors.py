"""Errors in the format of OpenAI's API: what was wrong, and what to do."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gradmem_adapter.store import MemoryStoreError, UnknownStateError
from gradmem_adapter.utils.files import FULL
from gradmem_adapter.utils.state_file import MemoryStateError

CLIENT_IS_GONE = 499
_log = logging.getLogger("uvicorn.error")
_REFUSED = (ValueError, TypeError, NotImplementedError, ImportError, TemplateError)
"""The exceptions that this package raises for wrong input."""
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that is sent to a client.

    Args:
        status (`int`): the HTTP status.
        message (`str`): what was wrong, and what to do.
        code (`str`, *optional*): an identifier for programs.
        param (`str`, *optional*): the field that was wrong.
        retry_after (`int`, *optional*): seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON, in the format of OpenAI's API."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response with this error."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def too_large() -> ApiError:
    """The error for a request whose body is too long."""
    return ApiError(413, "The request is larger than this server accepts. Split a long text into parts.", "too_large")


def api_error(error: BaseException) -> ApiError:
    """The error that a client is sent for an exception. It gives no details unless the client caused it."""
    match error:
        case ApiError():
            return error
        case UnknownStateError():
            return ApiError(404, "The memory was deleted in the meantime. Write its text again.", "memory_not_found")
        case MemoryStateError():
            told = "A stored memory is damaged. Write its text again."
            return _logged(error, ApiError(500, told, "memory_damaged"))
        case MemoryStoreError() | OSError() if not isinstance(error, ConnectionError | TimeoutError):
            return _logged(error, ApiError(503, "The memory store is not available. Ask the operator of this server."))
        case MemoryError() | torch.OutOfMemoryError():
            return _logged(error, ApiError(503, "The server is out of memory. Send less at once, or try later."))
        case _ if isinstance(error, _REFUSED):
            return ApiError(400, " ".join(str(error).split()))
        case ConnectionError() | TimeoutError() | RuntimeError():
            told = "The model or its engine failed. Try again, or ask the operator of this server."
            return _logged(error, ApiError(502, told, "engine_failed"))
        case asyncio.CancelledError() | ClientDisconnect():
            return ApiError(CLIENT_IS_GONE, "The request was cancelled.")
        case _:
            return _logged(error, ApiError(500, "The server failed. Ask its operator: the log has details."))


@contextmanager
def api_errors() -> Iterator[None]:
    """Turn exceptions inside the block into API errors."""
    try:
        yield
    except Exception as error:
        raise api_error(error) from error


@contextmanager
def changing_a_store() -> Iterator[None]:
    """Turn a full or read-only disk inside the block into an API error that says that memories can still be read."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            told = (
                "The server's disk is full. Stored memories can still be read; delete some that are no longer needed."
            )
            raise _logged(error, ApiError(507, told, "store_full")) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            told = "The memories of this server can be read but not changed. Ask its operator."
            raise _logged(error, ApiError(503, told, "store_read_only")) from error
        raise


def add_handlers(app: FastAPI) -> None:
    """Make an app send all errors in this format."""

    def of_api(request: Request, error: Any) -> JSONResponse:
        return api_error(error).response()

    def of_fields(request: Request, error: Any) -> JSONResponse:
        # For invalid JSON, the location is a position in the body and names no field.
        names = ["" if one["type"] == "json_invalid" else _place(one["loc"][1:])[:80] for one in error.errors()]
        told = {
            "string_too_short": "It must have at least 1 character",
            "model_attributes_type": "Send a JSON object, with the header Content-Type: application/json",
        }
        said = [told.get(one["type"], one["msg"].removeprefix("Value error, ").rstrip(".")) for one in error.errors()]
        message = "; ".join(": ".join(filter(None, pair)) for pair in zip(names[:5], said[:5], strict=True))
        message += "" if message.endswith("?") else "."
        return ApiError(400, message, error.errors()[0]["type"], param=names[0] or None).response()

    def of_http(request: Request, error: Any) -> JSONResponse:
        told = {
            404: f"This server has no {request.method} {request.url.path}. /openapi.json lists what it has.",
            405: f"{request.url.path} does not accept {request.method}. /openapi.json says what it accepts.",
        }
        if error.status_code == 413:
            return too_large().response()
        return ApiError(error.status_code, told.get(error.status_code, str(error.detail))).response()

    app.add_exception_handler(ApiError, of_api)
    app.add_exception_handler(ClientDisconnect, of_api)
    app.add_exception_handler(RequestValidationError, of_fields)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(Exception, of_api)


def _place(steps: Sequence[str | int]) -> str:
    """A location in a body, as OpenAI's API writes it: `messages[0].content`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def _logged(error: BaseException, told: ApiError) -> ApiError:
    _log.error("%s: %s", type(error).__name__, error, exc_info=error)
    return told
