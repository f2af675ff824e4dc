"""Server-sent events: one generator of events becomes one response.

Errors before the first event are ordinary error responses; later ones are an event, and so are
those that come after a silence so long that the stream had to begin without its first event. The
generator is closed as soon as the client leaves. This module knows nothing of what the events say.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from specinfer.errors import InternalError, SpecinferError
from specinfer_router.gateway.calls import disconnected
from specinfer_router.gateway.errors import REQUEST_ID_HEADER, error_body, error_response

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
# Without a blank line: after one, the `openai` client takes an earlier event's id for an event.
KEEP_ALIVE = b": keep-alive\n"
# One encoder for all events: `json.dumps` with options makes a new one each time.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class _ReaderGone(Exception):
    """The client took nothing for too long."""


def encode_json(data: dict[str, Any]) -> bytes:
    """Compact JSON; a lone surrogate, which UTF-8 has not, is replaced."""
    return _encode(data).encode(errors="replace")


@dataclass(frozen=True)
class StreamSettings:
    """How streams are kept and given up.

    Attributes:
        keep_alive_seconds: a comment is sent when nothing else was for so long, before the first
            event as well.
        write_seconds: a client that takes nothing for so long is cut off.
    """

    keep_alive_seconds: float = 15.0
    write_seconds: float = 300.0


@dataclass(frozen=True)
class ServerEvent:
    """One event.

    Attributes:
        data: becomes JSON; None makes a comment, which readers skip.
        id: what the client sends back as Last-Event-ID, or "".
        name: type of the event, or "".
    """

    data: dict[str, Any] | None
    id: str = ""
    name: str = ""

    def encode(self) -> bytes:
        """The event's lines."""
        if self.data is None:
            return KEEP_ALIVE
        head = f"event: {self.name}\n" if self.name else ""
        head += f"id: {self.id}\n" if self.id else ""
        return b"%bdata: %b\n\n" % (head.encode(), encode_json(self.data))


class EventStream(Response):
    """A response that sends events as they come."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[ServerEvent, None],
        request_id: str,
        *,
        settings: StreamSettings | None = None,
        done: bool = True,
    ) -> None:
        """Take over a generator.

        Args:
            events: closed when the response ends, however it ends.
            request_id: of the call.
            settings: how the stream is kept and given up.
            done: whether `data: [DONE]` comes last.
        """
        self._events = events
        self._request_id = request_id
        self._settings = settings or StreamSettings()
        self._done = done
        self._last_write = 0.0
        self.background = None
        self.status_code = 200
        self.init_headers(
            {
                REQUEST_ID_HEADER: request_id,
                "cache-control": "no-cache",
                # Proxies that would collect the events into larger pieces are told not to.
                "x-accel-buffering": "no",
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client leaves."""
        async with aclosing(self._events):
            sending = asyncio.create_task(self._send_all(scope, receive, send))
            leaving = asyncio.create_task(disconnected(receive))
            try:
                await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()
            finally:
                sending.cancel()
                leaving.cancel()
                await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = asyncio.create_task(self._first())
        try:
            # Whoever hears nothing for long gives up, a proxy for one: then a comment comes first.
            await asyncio.wait((first,), timeout=self._settings.keep_alive_seconds)
            if first.done() and isinstance(error := first.result(), SpecinferError):
                await error_response(error, self._request_id)(scope, receive, send)
            else:
                await self._send_stream(send, first)
        except _ReaderGone:
            log.info("a reader was cut off", extra={"request_id": self._request_id})
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    async def _first(self) -> bytes | SpecinferError:
        """The first event's lines, or why there are none."""
        try:
            return (await anext(self._events)).encode()
        except SpecinferError as error:
            return error
        except Exception:  # the last place that can still answer
            return self._unforeseen()

    async def _send_stream(self, send: Send, first: asyncio.Task[bytes | SpecinferError]) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send(start | {"headers": self.raw_headers})
        if not first.done():
            await self._write(send, KEEP_ALIVE)
        self._last_write = asyncio.get_running_loop().time()
        keeping_alive = asyncio.create_task(self._keep_alive(send))
        try:
            opening = await first
            if isinstance(opening, SpecinferError):
                await self._write(send, ServerEvent(error_body(opening)).encode())
            else:
                await self._write(send, opening)
                await self._send_rest(send)
        finally:
            keeping_alive.cancel()
        await send({"type": "http.response.body", "body": DONE if self._done else b""})

    async def _send_rest(self, send: Send) -> None:
        try:
            async for event in self._events:
                await self._write(send, event.encode())
        except SpecinferError as error:
            await self._write(send, ServerEvent(error_body(error)).encode())
        except _ReaderGone:
            raise
        except Exception:  # the client is told something rather than cut off
            await self._write(send, ServerEvent(error_body(self._unforeseen())).encode())

    def _unforeseen(self) -> InternalError:
        log.exception("a stream failed", extra={"request_id": self._request_id})
        return InternalError("this server made an error", request_id=self._request_id)

    async def _write(self, send: Send, content: bytes) -> None:
        """Send one piece; raises _ReaderGone when the client takes nothing for too long."""
        self._last_write = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._settings.write_seconds):
                await send({"type": "http.response.body", "body": content, "more_body": True})
        except TimeoutError as error:
            raise _ReaderGone from error

    async def _keep_alive(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = self._last_write + self._settings.keep_alive_seconds
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
                continue
            # A client that takes no comment takes no event either, and is cut off there.
            with suppress(_ReaderGone):
                await self._write(send, KEEP_ALIVE)
