"""Lua scripts in Redis: sent by hash, as text where Redis has lost them, many in one pipeline.

Scripts and not functions: functions need Redis 7 and a user that may load libraries on every node,
and a failover to a replica may lose them; a script costs the right to EVAL and comes back with the
first command that misses it. This module knows nothing of sessions.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

Argument = str | bytes | int

MAX_PIPELINE = 256
_AT_ONCE = 8


@dataclass(frozen=True)
class Script:
    """One script's text and the hash that Redis knows it by."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        # Redis names scripts so; nothing rests on it being hard to forge.
        digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest)

    @property
    def name(self) -> tuple[bytes, bytes]:
        """The command that runs it, by its hash."""
        return b"EVALSHA", self.sha.encode()


@dataclass(frozen=True)
class Call:
    """One run of a script; all keys share a slot."""

    script: Script
    keys: Sequence[str]
    arguments: Sequence[Argument]

    def packed(self) -> bytes:
        """The command as Redis reads it (RESP), made here because it is made for every round."""
        parts = [*self.script.name, b"%d" % len(self.keys)]
        parts += [key.encode() for key in self.keys]
        for argument in self.arguments:
            if isinstance(argument, bytes):
                parts.append(argument)
            else:
                parts.append(str(argument).encode())
        pieces = [b"*%d\r\n" % len(parts)]
        pieces += [b"$%d\r\n%b\r\n" % (len(part), part) for part in parts]
        return b"".join(pieces)

    def command(self, *, by_text: bool = False) -> tuple[Argument, ...]:
        """What is sent."""
        name = ("EVAL", self.script.text) if by_text else ("EVALSHA", self.script.sha)
        return (*name, len(self.keys), *self.keys, *self.arguments)


Waiting = tuple[Call, "asyncio.Future[Any]"]


async def run_script(client: Redis | RedisCluster, call: Call) -> Any:
    """One call's answer; raises RedisError."""
    try:
        return await client.execute_command(*call.command())
    except NoScriptError:
        return await client.execute_command(*call.command(by_text=True))


async def run_scripts(client: Redis | RedisCluster, calls: Sequence[Call]) -> list[Any]:
    """The answers of calls that go out together, an exception where one failed.

    Raises:
        RedisError: when none of them could be sent.
    """
    if not calls:
        return []
    if isinstance(client, Redis):
        answers = await _exchange(client, calls)
    else:
        answers = await _pipeline(client, [call.command() for call in calls])
    lost = [at for at, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
    if lost:
        again = await _pipeline(client, [calls[at].command(by_text=True) for at in lost])
        for at, answer in zip(lost, again, strict=True):
            answers[at] = answer
    return answers


async def _exchange(client: Redis, calls: Sequence[Call]) -> list[Any]:
    """All calls on one connection, then all answers.

    A pipeline of the client's would do as well, for twice the time on the event loop.
    """
    # The client does not say what its pools hold.
    pool: Any = client.connection_pool
    connection = await pool.get_connection()

    async def exchange() -> list[Any]:
        for start in range(0, len(calls), _AT_ONCE):
            # Redis works on the first while the next are still being packed.
            some = calls[start : start + _AT_ONCE]
            await connection.send_packed_command(b"".join(call.packed() for call in some))
        async with asyncio.timeout(connection.socket_timeout):
            return [await read() for _ in calls]

    async def read() -> Any:
        try:
            return await connection.read_response(timeout=math.inf)
        except ResponseError as error:
            return error

    async def reconnect(_: Exception) -> None:
        await connection.disconnect()

    try:
        return cast(list[Any], await connection.retry.call_with_retry(exchange, reconnect))
    except BaseException:
        # Answers that nobody has read must not be taken for those of the next calls.
        await connection.disconnect(nowait=True)
        raise
    finally:
        await pool.release(connection)


async def _pipeline(
    client: Redis | RedisCluster, commands: Sequence[tuple[Argument, ...]]
) -> list[Any]:
    if len(commands) == 1:
        # A pipeline of one costs more than its command.
        try:
            return [await client.execute_command(*commands[0])]
        except NoScriptError as error:
            return [error]
    pipe = client.pipeline(transaction=False)
    for command in commands:
        pipe.execute_command(*command)
    answers: list[Any] = await pipe.execute(raise_on_error=False)
    return answers


class ScriptBatch:
    """Sends the calls that come up in one turn of the event loop together.

    While some are under way the next gather; so a call waits for two round trips at most. There
    are as many calls as there are callers that wait, and each of them has one. What takes longer
    than `patience_seconds` fails as a time-out.
    """

    def __init__(self, client: Redis | RedisCluster, *, patience_seconds: float) -> None:
        self._client = client
        self._patience_seconds = patience_seconds
        self._waiting: list[Waiting] = []
        self._sender: asyncio.Task[None] | None = None
        # Kept until they have let go of their connections.
        self._given_up: set[asyncio.Task[None]] = set()

    async def run(self, call: Call) -> Any:
        """One call's answer; raises RedisError."""
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, answered))
        if self._sender is None:
            self._sender = asyncio.create_task(self._send())
        return await answered

    def give_up(self) -> None:
        """Fail every call that waits, and what is under way with them."""
        sender, self._sender = self._sender, None
        waiting, self._waiting = self._waiting, []
        if sender is not None:
            sender.cancel()
            self._given_up.add(sender)
            sender.add_done_callback(self._given_up.discard)
        _fail(waiting, RedisConnectionError("the connection was given up"))

    async def close(self) -> None:
        """Give up, and return when nothing is under way any more."""
        self.give_up()
        if self._given_up:
            await asyncio.wait(list(self._given_up))

    async def _send(self) -> None:
        sent: list[Waiting] = []
        try:
            while self._waiting:
                # Whoever has gone needs no answer, and its commit would come too late.
                waiting = [each for each in self._waiting if not each[1].done()]
                sent, self._waiting = waiting[:MAX_PIPELINE], waiting[MAX_PIPELINE:]
                await self._send_together(sent)
        finally:
            _fail(sent, RedisConnectionError("the connection was given up"))
            # Unless given up: then another one may be on its way already.
            if self._sender is asyncio.current_task():
                self._sender = None

    async def _send_together(self, sent: list[Waiting]) -> None:
        try:
            async with asyncio.timeout(self._patience_seconds):
                answers = await run_scripts(self._client, [call for call, _ in sent])
            # All in one turn: what they ask of workers next goes out in one frame again.
            for (_, answered), answer in zip(sent, answers, strict=True):
                _tell(answered, answer)
        except TimeoutError:
            _fail(sent, RedisTimeoutError(f"no answer for {self._patience_seconds:g} s"))
        except Exception as error:
            # Whatever it was: each caller waits for an answer of its own.
            _fail(sent, error)


def _tell(answered: asyncio.Future[Any], answer: Any) -> None:
    if answered.done():
        return
    if isinstance(answer, Exception):
        answered.set_exception(answer)
    else:
        answered.set_result(answer)


def _fail(calls: Sequence[Waiting], error: Exception) -> None:
    for _, answered in calls:
        _tell(answered, error)
