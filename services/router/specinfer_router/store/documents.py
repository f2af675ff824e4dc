"""Small texts by name in memory: bounded in number and size, forgotten after a while.

It knows nothing of what the texts say.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable

from specinfer.errors import InvalidRequest, NotFound
from specinfer_router.store.interface import MAX_DOCUMENT_BYTES

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,200}")


class MemoryDocuments:
    """Keeps texts of at most `max_bytes` in all; the one that changed longest ago makes room."""

    def __init__(
        self,
        *,
        max_bytes: int = 256 * 1024 * 1024,
        ttl_seconds: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._num_bytes = 0
        # Name to text and expiry, oldest change first.
        self._texts: OrderedDict[str, tuple[bytes, float]] = OrderedDict()

    def put(self, name: str, text: str) -> None:
        """Keep a text; raises InvalidRequest when the name is none or the text too large."""
        data = checked_document(name, text)
        self.delete(name)
        self._make_room(len(data))
        self._num_bytes += len(data)
        self._texts[name] = (data, self._clock() + self._ttl_seconds)

    def get(self, name: str) -> str:
        """The text under a name; raises NotFound."""
        data, expires = self._texts.get(name, (b"", 0.0))
        if expires <= self._clock():
            raise NotFound(f"no {name}, or it has expired")
        return data.decode()

    def delete(self, name: str) -> None:
        """Forget a text; there need be none."""
        data, _ = self._texts.pop(name, (b"", 0.0))
        self._num_bytes -= len(data)

    def clear(self) -> None:
        """Forget everything."""
        self._texts.clear()
        self._num_bytes = 0

    def _make_room(self, num_bytes: int) -> None:
        now = self._clock()
        while self._texts:
            name, (_, expires) = next(iter(self._texts.items()))
            if expires > now and self._num_bytes + num_bytes <= self._max_bytes:
                return
            self.delete(name)


def checked_document(name: str, text: str) -> bytes:
    """The text as bytes; raises InvalidRequest when the name is none or the text too large."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            "a document's name is 1 to 200 letters, digits and . _ : -", field="name"
        )
    data = text.encode()
    if len(data) > MAX_DOCUMENT_BYTES:
        raise InvalidRequest(
            f"{len(data)} bytes are too many to keep; at most {MAX_DOCUMENT_BYTES} are",
            field="name",
        )
    return data
