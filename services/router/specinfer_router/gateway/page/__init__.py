"""The chat page's files over HTTP: types, revalidation and a strict content security policy.

The page is plain HTML, CSS and ES modules beside this module; nothing is built, and nothing is
loaded from elsewhere. This module knows nothing of sessions, models or the API that the page calls.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER = Path(__file__).resolve().parent
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No inline script or style, no other origin, no frame around us, and no string that becomes HTML:
# what a model writes can reach the page as text alone.
_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    # A changed file is seen at once, an unchanged one costs a 304.
    "cache-control": "no-cache",
    "content-security-policy": _CONTENT_SECURITY_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class PageFile:
    """One file of the page, read once.

    Attributes:
        path: where it is served.
        media_type: its content type.
        content: its bytes.
        etag: a quoted hash of the bytes.
    """

    path: str
    media_type: str
    content: bytes
    etag: str

    def response(self, request: Request) -> Response:
        """The file, or 304 when the browser has it already."""
        headers = {**_HEADERS, "etag": self.etag}
        if _knows(request.headers.get("if-none-match", ""), self.etag):
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def page_routes() -> list[Route]:
    """Routes of the chat page: `/` and its files under `/page/`.

    Raises:
        OSError: the installation lacks the page's files.
    """
    return [
        _route(_read(path)) for path in sorted(_FOLDER.iterdir()) if path.suffix in _MEDIA_TYPES
    ]


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    return PageFile(
        path="/" if path.name == "index.html" else f"/page/{path.name}",
        media_type=_MEDIA_TYPES[path.suffix],
        content=content,
        etag=f'"{hashlib.sha256(content).hexdigest()[:32]}"',
    )


def _route(file: PageFile) -> Route:
    async def answer(request: Request) -> Response:
        return file.response(request)

    return Route(file.path, answer, methods=["GET"], name=f"page {file.path}")


def _knows(if_none_match: str, etag: str) -> bool:
    known = (tag.strip().removeprefix("W/") for tag in if_none_match.split(","))
    return any(tag in (etag, "*") for tag in known)
