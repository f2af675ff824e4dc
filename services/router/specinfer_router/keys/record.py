"""One API key: how it is made, what is kept of it, and its line in a file.

A key is `sk-ID-SECRET`. The id is public and finds the record; the secret is 256 random bits, and
of the whole only a SHA-256 is kept. Slow password hashes exist because people choose passwords that
can be guessed; nobody can try 2**256 secrets, so a fast hash is as safe here, and a call does not
pay for a slow one. This module knows nothing of where records are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from specinfer.errors import InvalidRequest
from specinfer_router.access import ROLES, USER, KeyLimits

_KEY = re.compile(r"sk-([0-9a-f]{12})-[0-9a-f]{64}", re.ASCII)
_ID = re.compile(r"[0-9a-f]{12}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MAX_NAME = 100
_LIMIT_NAMES = ("max_streams", "requests_per_minute", "tokens_per_minute")


@dataclass(frozen=True)
class KeyRecord:
    """What is kept of a key.

    Attributes:
        key_id: public part of the key, 12 hexadecimal digits.
        name: what people call it.
        sha256: of the whole key, hexadecimal.
        created: when it was made, with a time zone.
        expires: from when on it is refused, or None.
        limits: what it may use.
        role: what its owner may do, one of ROLES.
    """

    key_id: str
    name: str
    sha256: str
    created: datetime
    expires: datetime | None = None
    limits: KeyLimits = field(default_factory=KeyLimits)
    role: str = USER


def new_key(
    name: str,
    *,
    limits: KeyLimits,
    now: datetime,
    expires: datetime | None = None,
    role: str = USER,
) -> tuple[str, KeyRecord]:
    """A key, to be shown once, and its record; raises InvalidRequest."""
    if expires is not None and expires <= now:
        raise InvalidRequest("a key expires in the future", field="expires")
    key_id = secrets.token_hex(6)
    key = f"sk-{key_id}-{secrets.token_hex(32)}"
    record = KeyRecord(key_id, name, digest(key), now, expires, limits, role)
    return key, parse_record(format_record(record))


def digest(key: str) -> str:
    """SHA-256 of a key, hexadecimal."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def key_id_of(key: str) -> str | None:
    """The id in a key, or None for what is no key."""
    match = _KEY.fullmatch(key)
    return match[1] if match else None


def format_record(record: KeyRecord) -> str:
    """A record as one line of JSON, without its line end."""
    fields: dict[str, Any] = {
        "id": record.key_id,
        "name": record.name,
        "sha256": record.sha256,
        "created": record.created.isoformat(timespec="seconds"),
    }
    if record.expires is not None:
        fields["expires"] = record.expires.isoformat(timespec="seconds")
    for name in _LIMIT_NAMES:
        if getattr(record.limits, name) is not None:
            fields[name] = getattr(record.limits, name)
    if record.limits.max_priority:
        fields["max_priority"] = record.limits.max_priority
    if record.role != USER:
        fields["role"] = record.role
    return json.dumps(fields, ensure_ascii=False)


def parse_record(line: str) -> KeyRecord:
    """A record from its line; raises InvalidRequest that says what is wrong and shows no digest."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("a key's line is one JSON object", field="keys") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("a key's line is one JSON object", field="keys")
    take = _Taker(fields)
    record = KeyRecord(
        key_id=take.text("id", _ID.fullmatch, "12 hexadecimal digits"),
        name=take.text("name", _is_name, f"1 to {_MAX_NAME} printable characters"),
        sha256=take.text("sha256", _DIGEST.fullmatch, "64 hexadecimal digits"),
        created=take.time("created") or datetime.fromtimestamp(0, UTC),
        expires=take.time("expires"),
        limits=KeyLimits(
            max_streams=take.number("max_streams", least=1),
            requests_per_minute=take.number("requests_per_minute", least=1),
            tokens_per_minute=take.number("tokens_per_minute", least=1),
            max_priority=take.number("max_priority", least=-(2**31)) or 0,
        ),
        role=take.choice("role", ROLES, USER),
    )
    if fields:
        raise _wrong(str(next(iter(fields)))[:_MAX_NAME], "not a field of a key")
    return record


class _Taker:
    """Takes checked fields out of a mapping; what is left over is unknown."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def text(self, name: str, fits: Callable[[str], object], kind: str) -> str:
        value = self._fields.pop(name, None)
        if not isinstance(value, str) or not fits(value):
            raise _wrong(name, kind)
        return value

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        value = self._fields.pop(name, default)
        if value not in choices:
            raise _wrong(name, f"one of {', '.join(choices)}")
        return str(value)

    def time(self, name: str) -> datetime | None:
        value = self._fields.pop(name, None)
        if value is None:
            return None
        return parse_time(value, name)

    def number(self, name: str, *, least: int) -> int | None:
        value = self._fields.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise _wrong(name, f"a whole number of at least {least}")
        return value


def parse_time(value: object, name: str) -> datetime:
    """A date, or a time such as 2030-01-31T12:00:00+00:00; without a zone it is UTC.

    Raises:
        InvalidRequest: naming `name`.
    """
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        moment = None
    if moment is None:
        raise _wrong(name, "a date or a time such as 2030-01-31T12:00:00+00:00")
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def parse_records(lines: Mapping[str, str]) -> dict[str, KeyRecord]:
    """Records by id, from lines by where each one stands, which errors name."""
    records: dict[str, KeyRecord] = {}
    for place, line in lines.items():
        try:
            record = parse_record(line)
        except InvalidRequest as error:
            raise InvalidRequest(f"{place}: {error.message}", field="keys") from error
        if record.key_id in records:
            raise InvalidRequest(f"{place}: key {record.key_id} is there twice", field="keys")
        records[record.key_id] = record
    return records


def _is_name(text: str) -> bool:
    return 0 < len(text) <= _MAX_NAME and text.isprintable()


def _wrong(name: str, kind: str) -> InvalidRequest:
    return InvalidRequest(f"{name!r} is {kind}", field=name)
