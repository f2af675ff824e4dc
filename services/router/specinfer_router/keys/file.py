"""Keys in a file: one line of JSON each, changed as a whole so that a reader never sees half.

Only its owner may read the file that is written here. This module knows nothing of who asks.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specinfer.errors import InvalidRequest, NotFound
from specinfer_router.keys.record import KeyRecord, format_record, parse_records

MAX_FILE_BYTES = 2**24
_OWNER_ALONE = 0o600


class KeyFile:
    """The keys of one file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def version(self) -> str:
        """What changes when the file does; raises InvalidRequest."""
        return await asyncio.to_thread(self._version)

    async def load(self) -> dict[str, KeyRecord]:
        """All keys by id; raises InvalidRequest for a line that is no key."""
        return await asyncio.to_thread(self._read)

    async def close(self) -> None:
        """There is nothing to give up."""

    async def add(self, record: KeyRecord) -> None:
        """Keep one more key; the file is made when there is none."""
        await asyncio.to_thread(self._add, record)

    async def remove(self, key_id: str) -> None:
        """Forget a key; raises NotFound."""
        await asyncio.to_thread(self._remove, key_id)

    def _read(self) -> dict[str, KeyRecord]:
        try:
            if self._path.stat().st_size > MAX_FILE_BYTES:
                raise InvalidRequest(f"{self._path} is too large for keys", field="keys")
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from error
        return parse_records(
            {
                f"{self._path}, line {number}": line
                for number, line in enumerate(text.splitlines(), 1)
                if line.strip() and not line.startswith("#")
            }
        )

    def _add(self, record: KeyRecord) -> None:
        with self._alone():
            records = self._read() if self._path.exists() else {}
            self._write({**records, record.key_id: record})

    def _remove(self, key_id: str) -> None:
        with self._alone():
            records = self._read()
            if key_id not in records:
                raise NotFound(f"{self._path} has no key {key_id}", field="key_id")
            del records[key_id]
            self._write(records)

    def _version(self) -> str:
        try:
            found = self._path.stat()
        except OSError as error:
            raise self._unreadable(error) from error
        return f"{found.st_ino} {found.st_mtime_ns} {found.st_size}"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else changes keys in this folder meanwhile."""
        try:
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _write(self, records: dict[str, KeyRecord]) -> None:
        text = "".join(format_record(record) + "\n" for record in records.values())
        try:
            number, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            with os.fdopen(number, "w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), _OWNER_ALONE)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self._path)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> InvalidRequest:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        return InvalidRequest(f"keys in {self._path}: {reason}", field="keys")
