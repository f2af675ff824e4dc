"""Users of every kind at once: those who read to the end, leave, cancel, come back or want JSON.

Every one of them knows what the right answer is. This module knows nothing of processes.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from specinfer import AsyncClient
from specinfer.errors import SpecinferError
from specinfer_bench.chaos.load import RETRY, SILENCE_SECONDS, EventReader, options_of, read_grpc
from specinfer_bench.chaos.readings import Answer, Case, Reading

SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {"answer": {"type": "boolean"}, "count": {"enum": [1, 2, 3]}},
    "required": ["answer", "count"],
    "additionalProperties": False,
}
SCHEMA_SEED = 5
SCHEMA_TOKENS = 64


@dataclass
class Tally:
    """What came of all requests.

    Attributes:
        requests: number of each kind.
        failed, different: what was wrong, for people.
    """

    requests: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Users:
    """What users have in common.

    Attributes:
        routers, gateways: addresses.
        model: served name.
        right: cases and their answers.
        structured: what the request with the schema has to give.
    """

    routers: Sequence[str]
    gateways: Sequence[str]
    model: str
    right: Mapping[Case, Answer]
    structured: str


class User:
    """One user, who does one thing after the other, by chance."""

    def __init__(self, users: Users, tally: Tally, seed: int) -> None:
        self._users = users
        self._tally = tally
        self._chance = random.Random(seed)
        self._name = f"user {seed}"
        self._kinds: dict[str, Callable[[Reading], Awaitable[None]]] = {
            "read": self._read,
            "http": self._http,
            "left": self._left,
            "cancelled": self._cancelled,
            "resumed": self._resumed,
            "structured": self._structured,
        }

    async def run(self, stopping: asyncio.Event) -> None:
        """Go on until told to stop."""
        routers = list(self._users.routers)
        self._chance.shuffle(routers)
        timeout = httpx.Timeout(SILENCE_SECONDS)
        async with (
            AsyncClient(routers, retry=RETRY, attempt_timeout=SILENCE_SECONDS) as self._client,
            httpx.AsyncClient(timeout=timeout, trust_env=False) as self._http_client,
        ):
            while not stopping.is_set():
                await self._one()

    async def _one(self) -> None:
        kind = self._chance.choice(tuple(self._kinds))
        case = self._chance.choice(tuple(self._users.right))
        reading = Reading(f"{self._name}, {kind}", case, time.monotonic(), token_ids=[])
        self._tally.requests[kind] += 1
        try:
            await self._kinds[kind](reading)
        except SpecinferError as error:
            reading.error = f"{type(error).__name__}: {error.message}"
        if reading.error:
            self._tally.failed.append(f"{reading.client}: {reading.error}")

    def _hold(self, reading: Reading) -> None:
        if not reading.error and (complaint := reading.complaint(self._users.right[reading.case])):
            self._tally.different.append(complaint)

    async def _read(self, reading: Reading) -> None:
        await read_grpc(self._client, reading)
        self._hold(reading)

    async def _http(self, reading: Reading) -> None:
        reading.token_ids = None
        gateways = self._users.gateways
        await EventReader(self._http_client, gateways, self._users.model, reading).read_all()
        self._hold(reading)

    async def _left(self, reading: Reading) -> None:
        await self._begin(reading)
        self._hold_start(reading)

    async def _cancelled(self, reading: Reading) -> None:
        session = await self._begin(reading)
        self._hold_start(reading)
        await self._client.cancel(session)

    async def _resumed(self, reading: Reading) -> None:
        session = await self._begin(reading)
        tokens = reading.token_ids or []
        async with self._client.resume(session, len(tokens)) as stream:
            async for event in stream:
                tokens.extend(event.token_ids)
        right = self._users.right[reading.case]
        reading.text = right.text  # the text of the two parts is not put together here
        self._hold(reading)

    async def _structured(self, reading: Reading) -> None:
        text = await structured(self._client)
        if text != self._users.structured:
            self._tally.different.append(f"{reading.client}: {text!r}")

    async def _begin(self, reading: Reading) -> str:
        """Read a part of a stream and leave it; its session."""
        tokens = reading.token_ids if reading.token_ids is not None else []
        enough = self._chance.randrange(1, reading.case.max_tokens)
        async with self._client.stream(reading.case.prompt, **options_of(reading.case)) as stream:
            async for event in stream:
                tokens.extend(event.token_ids)
                if len(tokens) >= enough:
                    break
            assert stream.resume_token is not None
            return stream.resume_token.session_id

    def _hold_start(self, reading: Reading) -> None:
        tokens = tuple(reading.token_ids or ())
        if tokens != self._users.right[reading.case].token_ids[: len(tokens)]:
            self._tally.different.append(f"{reading.client}: its first {len(tokens)} tokens")


async def structured(client: AsyncClient) -> str:
    """The text of a request whose answer is JSON of a schema."""
    done = await client.generate(
        "An object:",
        json_schema=SCHEMA,
        max_tokens=SCHEMA_TOKENS,
        temperature=0.8,
        seed=SCHEMA_SEED,
    )
    return done.text
