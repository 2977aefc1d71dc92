"""API keys, and the tenants that they belong to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradmem_adapter.serve.errors import ApiError, too_large
from gradmem_adapter.utils.files import read_text

LOCAL = "local"
"""The tenant of a server without keys. A server with keys may have it, too."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_SHORTEST = 16


class Tenants:
    """The tenants of API keys.

    Args:
        keys (`Mapping[str, str]`, *optional*): the tenant of each key; none: all requests are of one tenant.

    Raises:
        ValueError: a name is not safe for a folder, or a key is too short to be secret.
    """

    def __init__(self, keys: Mapping[str, str] | None = None) -> None:
        for key, name in (keys or {}).items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"A tenant's name must be 1 to 63 lowercase letters, digits, - and _, got {name!r}.")
            if len(key) < _SHORTEST:
                raise ValueError(f"The key of {name!r} is too short: use at least {_SHORTEST} characters.")
        self._names = {_digest(key): name for key, name in (keys or {}).items()}

    @classmethod
    def from_file(cls, path: Path) -> Tenants:
        """Tenants of a file with a tenant and a key on each line; a tenant may have several.

        Args:
            path (`Path`): the file; everything after `#` is a comment.
        """
        keys: dict[str, str] = {}
        for number, line in enumerate(read_text(path).splitlines(), 1):
            fields = line.partition("#")[0].split()
            if not fields:
                continue
            if len(fields) != 2 or fields[1] in keys:
                raise ValueError(f"{path}, line {number} must be a tenant and a key that no other line has.")
            keys[fields[1]] = fields[0]
        if not keys:
            raise ValueError(f"{path} has no keys: write a tenant and a key on each line.")
        return cls(keys)

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        return bool(self._names)

    @property
    def names(self) -> set[str]:
        """The names of all tenants that are served."""
        return set(self._names.values()) or {LOCAL}

    def of(self, headers: Headers) -> str:
        """The tenant of a request.

        Raises:
            ApiError: the key is missing or wrong; or, on a server without keys, a browser page of another site sent it.
        """
        if not self:
            if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
                raise ApiError(403, "Pages of other sites may not use this server.")
            return LOCAL
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise ApiError(401, "The API key is missing. Send the header Authorization: Bearer KEY.", "invalid_api_key")
        name = self._names.get(_digest(key.strip()))
        if name is None:
            raise ApiError(401, "The API key is wrong. Ask the operator of this server for one.", "invalid_api_key")
        return name


def _digest(key: str) -> bytes:
    """A digest to look up instead of the key, so that the time of the look-up reveals nothing about the key."""
    return hashlib.sha256(key.encode()).digest()


class Gate:
    """Middleware that refuses requests without a known tenant before their body is read, and bodies that are too long.

    Args:
        app (`ASGIApp`): the app, which finds the tenant in `request.state.tenant` for paths under `/v1`.
        tenants (`Tenants`): who may use the server.
        body_bytes (`int`): the most bytes in a body.
        hosts (`Collection[str]`): host names accepted if no key is needed. This keeps out pages whose domain name was
            made to resolve to this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, tenants: Tenants, body_bytes: int, hosts: Collection[str]) -> None:
        self.app, self.tenants, self.body_bytes, self.hosts = app, tenants, body_bytes, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, size = Headers(scope=scope), 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.body_bytes:
                raise HTTPException(413)
            return message

        try:
            self._check_host(headers.get("host", ""))
            if scope["path"].startswith("/v1/"):
                scope.setdefault("state", {})["tenant"] = self.tenants.of(headers)
            if int(headers.get("content-length", "0")) > self.body_bytes:
                raise too_large()
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, bounded, send)

    def _check_host(self, host: str) -> None:
        if not self.tenants and urlsplit(f"//{host}").hostname not in self.hosts:
            raise ApiError(400, f"This server does not answer to {host[:80]!r}. Use {' or '.join(sorted(self.hosts))}.")
