"""The playground page at `/`: files of the package, no build step, nothing from elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib import resources

from fastapi import APIRouter, Response
from starlette.exceptions import HTTPException

router = APIRouter()

# Only what is listed here is served: a path of a request never becomes the path of a file.
FILES = (
    *("index.html", "playground.css", "icon.svg", "api.js", "app.js", "charts.js", "conversation.js", "inside.js"),
    *("markdown.js", "request.js", "run.js", "tree.js"),
)
_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "js": "text/javascript; charset=utf-8",
}
PATHS = frozenset({"/", *(f"/static/{name}" for name in FILES if name != "index.html")})

_HEADERS: Mapping[str, str] = {
    # Nothing inline, nothing from elsewhere, and in no other page's frame: the page holds an API key.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    # The files belong together: after an upgrade none may stay behind.
    "cache-control": "no-cache",
}


@router.get("/", include_in_schema=False)
async def page() -> Response:
    return await _file("index.html")


@router.get("/static/{name}", include_in_schema=False)
async def static(name: str) -> Response:
    if f"/static/{name}" not in PATHS:
        raise HTTPException(404)
    return await _file(name)


async def _file(name: str) -> Response:
    content = await asyncio.to_thread((resources.files("gateway.rest") / "static" / name).read_bytes)
    return Response(content, media_type=_MEDIA_TYPES[name.rpartition(".")[2]], headers=_HEADERS)
