"""Grammars on the draft service's wire: within them, refused by name, holding up nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from specinfer.convert import draft_result_from_wire, status_error
from specinfer.errors import InvalidRequest, NotFound
from specinfer.messages import Grammar
from tests.kit.draft_driver import GREEDY
from tests.kit.draft_service import (
    CHAIN,
    PROMPT,
    Service,
    opening,
    proposing,
    receive,
    send,
    served_drafter,
)
from tests.kit.grammars import token_ids_of


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with served_drafter() as served:
        yield served


async def test_a_tree_stays_within_the_sessions_grammar(service: Service) -> None:
    stream = service.stream()
    grammar = Grammar("regex", "([bd][aceg]){8}")
    await send(stream, opening(1, grammar=grammar), proposing(2))
    results = await receive(stream, 2)
    assert not results[1].status.code
    tree = draft_result_from_wire(results[2]).tree
    assert tree.max_depth == 4
    state = service.compiler.compile(grammar).start()
    for node in range(1, len(tree)):
        *before, token_id = tree.path_token_ids(node)[1:]
        assert token_id in (token_ids_of(state.mask_after(before)) or [])
    assert tree != service.bench.fresh_tree(list(PROMPT), GREEDY, CHAIN, len(PROMPT))
    await stream.done_writing()


async def test_a_bad_grammar_is_answered_by_its_name(service: Service) -> None:
    stream = service.stream()
    await send(stream, opening(1, grammar=Grammar("regex", "(a")), proposing(2), opening(3, "b"))
    results = await receive(stream, 3)
    error = status_error(results[1].status)
    assert isinstance(error, InvalidRequest)
    assert "unclosed" in error.message
    assert isinstance(status_error(results[2].status), NotFound)
    assert not results[3].status.code
    await stream.done_writing()


async def test_a_slow_grammar_holds_up_its_own_session_alone(service: Service) -> None:
    service.compiler.gate.clear()
    stream, grammar = service.stream(), Grammar("regex", "[bd]{9}")
    slow = (opening(1, "slow", grammar=grammar), proposing(2, "slow"))
    await send(stream, *slow, opening(3, "b"), proposing(4, "b"))
    assert set(await receive(stream, 2)) == {3, 4}
    await stream.done_writing()  # what was sent is answered all the same
    service.compiler.gate.set()
    results = await receive(stream, 2)
    assert not results[1].status.code
    assert draft_result_from_wire(results[2]).tree.max_depth == 4
    assert await stream.read() == grpc.aio.EOF


async def test_a_stream_that_ends_meanwhile_opens_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.compiler.gate.clear()
    opened: list[str] = []
    real = service.engine.open

    def noted(session_id: str, *arguments: Any, **options: Any) -> Any:
        opened.append(session_id)
        return real(session_id, *arguments, **options)

    ended, closing = asyncio.Event(), service.engine.close_stream

    def noted_end(stream: object) -> None:
        closing(stream)
        ended.set()

    monkeypatch.setattr(service.engine, "open", noted)
    monkeypatch.setattr(service.engine, "close_stream", noted_end)
    stream = service.stream()
    await send(stream, opening(1, "left", grammar=Grammar("regex", "b+")), opening(2, "b"))
    assert set(await receive(stream, 1)) == {2}
    stream.cancel()
    async with asyncio.timeout(10):
        await ended.wait()  # the service has heard of it
    other = service.stream()
    service.compiler.gate.set()
    await send(other, opening(1, "c", grammar=Grammar("regex", "b+")))
    assert not (await receive(other, 1))[1].status.code
    assert opened == ["b", "c"]
    await other.done_writing()
