"""The page at `/`: write a text, see what memory holds of it, ask. It uses only the public API."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

_FILES = {
    "/": ("serve/page/index.html", "text/html"),
    "/page.css": ("serve/page/page.css", "text/css"),
    "/page.js": ("serve/page/page.js", "text/javascript"),
    "/icon.svg": ("serve/page/icon.svg", "image/svg+xml"),
    "/example.json": ("data/story.json", "application/json"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """Routes for the page and its files. They need no key: the page asks for one."""
    router = APIRouter()
    for path, (name, kind) in _FILES.items():
        router.add_api_route(path, _file(name, kind), response_class=Response, include_in_schema=False)
    return router


def _file(name: str, kind: str) -> Callable[[], Response]:
    content = files("gradmem_adapter").joinpath(name).read_bytes()
    return lambda: Response(content, headers=_HEADERS, media_type=kind)
