"""Lua scripts in Redis: sent by hash, as text where Redis has lost them, many in one pipeline.

Scripts and not functions: functions need Redis 7 and a user that may load libraries on every node,
and a failover to a replica may lose them; a script costs the right to EVAL and comes back with the
first command that misses it. This module knows nothing of sessions.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError

Argument = str | bytes | int

MAX_PIPELINE = 256


@dataclass(frozen=True)
class Script:
    """One script's text and the hash that Redis knows it by."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        # Redis names scripts so; nothing rests on it being hard to forge.
        digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest)


@dataclass(frozen=True)
class Call:
    """One run of a script; all keys share a slot."""

    script: Script
    keys: Sequence[str]
    arguments: Sequence[Argument]

    def command(self, *, by_text: bool = False) -> tuple[Argument, ...]:
        """What is sent."""
        name = ("EVAL", self.script.text) if by_text else ("EVALSHA", self.script.sha)
        return (*name, len(self.keys), *self.keys, *self.arguments)


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
    answers = await _pipeline(client, [call.command() for call in calls])
    lost = [at for at, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
    if lost:
        again = await _pipeline(client, [calls[at].command(by_text=True) for at in lost])
        for at, answer in zip(lost, again, strict=True):
            answers[at] = answer
    return answers


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
    """Sends the calls that come up in one turn of the event loop as one pipeline.

    While one is under way the next gathers; so a call waits for two pipelines at most. There are
    as many calls as there are callers that wait, and each of them has one.
    """

    def __init__(self, client: Redis | RedisCluster) -> None:
        self._client = client
        self._waiting: list[tuple[Call, asyncio.Future[Any]]] = []
        self._sender: asyncio.Task[None] | None = None

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
        _fail(waiting)

    async def close(self) -> None:
        """Give up, and return when nothing is under way any more."""
        sender = self._sender
        self.give_up()
        if sender is not None:
            await asyncio.wait([sender])

    async def _send(self) -> None:
        sent: list[tuple[Call, asyncio.Future[Any]]] = []
        try:
            while self._waiting:
                sent, self._waiting = self._waiting[:MAX_PIPELINE], self._waiting[MAX_PIPELINE:]
                # Whoever has gone needs no answer, and its commit would come too late.
                sent = [(call, answered) for call, answered in sent if not answered.done()]
                if sent:
                    await self._send_together(sent)
        finally:
            _fail(sent)
            # Unless given up: then another one may be on its way already.
            if self._sender is asyncio.current_task():
                self._sender = None

    async def _send_together(self, sent: Sequence[tuple[Call, asyncio.Future[Any]]]) -> None:
        try:
            answers = await run_scripts(self._client, [call for call, _ in sent])
        except Exception as error:
            # Whatever it was: each caller waits for an answer of its own.
            answers = [error] * len(sent)
        for (_, answered), answer in zip(sent, answers, strict=True):
            if answered.done():
                continue
            if isinstance(answer, Exception):
                answered.set_exception(answer)
            else:
                answered.set_result(answer)


def _fail(calls: Sequence[tuple[Call, asyncio.Future[Any]]]) -> None:
    for _, answered in calls:
        if not answered.done():
            answered.set_exception(RedisConnectionError("the connection was given up"))
