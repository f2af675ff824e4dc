"""A reader of the gateway's event streams that goes on after a break, as a browser would.

It knows the event stream format and what a completion's chunks hold; nothing of servers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class StreamReader:
    """What was read of one stream, over as many connections as it took.

    Attributes:
        text: text of the choice so far.
        last_id: id of the last whole event.
        offsets: tokens that were there at each event, by its id.
        finish_reason: why the choice ended.
        usage: the last usage that was told.
        errors: error events.
        done: whether the end of the stream was read.
        breaks: events that were read when each connection broke.
    """

    text: str = ""
    last_id: str = ""
    offsets: list[int] = field(default_factory=list)
    finish_reason: str = ""
    usage: dict[str, Any] | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False
    breaks: list[int] = field(default_factory=list)
    _id: str = ""
    _data: str = ""

    async def read_all(self, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
        """Read to the end; a connection that breaks is followed by another."""
        while not self.done:
            try:
                await self.read(http, path, body)
            except httpx.TransportError:
                self.breaks.append(len(self.offsets))

    async def read(self, http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
        """Read over one connection; raises httpx.TransportError when it breaks."""
        headers = {"last-event-id": self.last_id} if self.last_id else {}
        self._id = self._data = ""
        async with http.stream("POST", path, json=body, headers=headers) as response:
            if response.status_code != 200:
                raise AssertionError(f"{response.status_code}: {await response.aread()!r}")
            async for line in response.aiter_lines():
                self.take(line)

    def take(self, line: str) -> None:
        """Take one line; an event counts once it is whole, which is at its empty line."""
        name, _, value = line.partition(": ")
        if name == "id":
            self._id = value
        elif name == "data":
            self._data = value
        elif not line and self._data:
            self._whole()

    def _whole(self) -> None:
        data, self._data = self._data, ""
        if data == "[DONE]":
            self.done = True
            return
        if self._id:
            self.last_id, self._id = self._id, ""
            self.offsets.append(int(self.last_id.rpartition(":")[2]))
        event = json.loads(data)
        if "error" in event:
            self.errors.append(event["error"])
            return
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            self.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
