"""Which workers there are: each announces itself, every router reads the list.

This module knows nothing of links, sessions or what a worker computes, nor of where the list is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

from specinfer.errors import InvalidRequest
from specinfer.messages import WorkerLoad

TIERS = ("draft", "verify")
# A worker says so often that it is there; three times in silence and it is taken to be gone.
HEARTBEAT_SECONDS = 0.5
EXPIRY_SECONDS = 1.5
# Most workers of a tier, and most bytes of what is kept of one.
MAX_WORKERS = 256
MAX_DOCUMENT_BYTES = 2048

_GROUP = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_WORKER_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
# Host and port alone: gRPC would take "unix:" paths and other schemes as well.
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_.-]{1,253}):([0-9]{1,5})")
_TEXT = re.compile(r"[\x20-\x7e]{0,128}")
_MAX_COUNT = 2**31


@dataclass(frozen=True)
class RegisteredWorker:
    """A worker as the registry knows it.

    Attributes:
        tier: one of TIERS.
        worker_id: unique name of the process.
        address: host and port that routers reach it at.
        model_hash: checkpoint that it serves.
        version: specinfer's version.
        load: when it was last heard of.

    Raises:
        InvalidRequest: naming the field that is none.
    """

    tier: str
    worker_id: str
    address: str
    model_hash: str = ""
    version: str = ""
    load: WorkerLoad = field(default_factory=WorkerLoad)

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise InvalidRequest(f"a tier is one of {', '.join(TIERS)}", field="tier")
        if not _WORKER_ID.fullmatch(self.worker_id):
            raise InvalidRequest(
                "a worker's id is 1 to 128 letters, digits and _ . : -", field="worker_id"
            )
        check_address(self.address)
        for name in ("model_hash", "version"):
            if not _TEXT.fullmatch(getattr(self, name)):
                raise InvalidRequest(f"{name} is at most 128 plain characters", field=name)


class WorkerRegistry(Protocol):
    """The list of the workers of one group; every method may raise Unavailable.

    Attributes:
        place: where the list is, for people.
    """

    place: str

    async def announce(self, worker: RegisteredWorker) -> None:
        """Put a worker on the list for EXPIRY_SECONDS by the registry's clock.

        Raises:
            ResourceExhausted: the list is full.
        """
        ...

    async def withdraw(self, worker: RegisteredWorker) -> None:
        """Take a worker off the list; it need not be there."""
        ...

    async def workers(self) -> Sequence[RegisteredWorker]:
        """The workers that were heard of lately; entries that are none are left out."""
        ...

    async def close(self) -> None:
        """Give the connections up."""
        ...


def check_address(address: str, field_name: str = "advertise") -> None:
    """Raise InvalidRequest unless it is a host or a bracketed IPv6 address, and a port."""
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match[1]) < 65536:
        raise InvalidRequest(
            f"{address[:64]!r} is no address that others could reach; one looks like host:50071",
            field=field_name,
        )


def check_group(group: str) -> None:
    """Raise InvalidRequest unless it can name a group of workers and routers."""
    if not _GROUP.fullmatch(group):
        raise InvalidRequest(
            "--group is 1 to 64 letters, digits, dots, dashes and underscores", field="group"
        )


def worker_to_json(worker: RegisteredWorker) -> bytes:
    """What is kept of a worker, beside its tier."""
    facts = asdict(worker)
    del facts["tier"]
    return json.dumps(facts, separators=(",", ":")).encode()


def worker_from_json(tier: str, document: bytes) -> RegisteredWorker:
    """The worker of a document that anybody may have written.

    Raises:
        InvalidRequest: it is none.
    """
    try:
        facts = json.loads(document) if len(document) <= MAX_DOCUMENT_BYTES else None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("an entry of the registry is no JSON") from error
    if not isinstance(facts, dict):
        raise InvalidRequest("an entry of the registry is no small JSON object")
    texts = {name: facts.get(name, "") for name in _TEXT_FIELDS}
    if not all(isinstance(text, str) for text in texts.values()):
        raise InvalidRequest("a name in an entry of the registry is no text")
    return RegisteredWorker(tier, **texts, load=_load(facts.get("load")))


def _load(found: Any) -> WorkerLoad:
    if not isinstance(found, dict):
        raise InvalidRequest("an entry of the registry has no load", field="load")
    counts = {name: found.get(name, 0) for name in _COUNTS}
    for name, count in counts.items():
        if type(count) is not int or not 0 <= count < _MAX_COUNT:
            raise InvalidRequest(f"{name} of an entry of the registry is no count", field=name)
    return WorkerLoad(**counts, draining=found.get("draining") is True)


_TEXT_FIELDS = ("worker_id", "address", "model_hash", "version")
_COUNTS = tuple(item.name for item in fields(WorkerLoad) if item.name != "draining")
