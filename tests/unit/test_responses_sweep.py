"""Responses in the background outlive the router that ran them, and are told as far as they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from specinfer_router.gateway.responses_run import BackgroundRuns
from specinfer_router.gateway.responses_store import ResponseStore
from specinfer_router.gateway.responses_sweep import ResponseSweep
from specinfer_router.store import ABANDONED, CANCELLED, MemoryStore, SessionRecord
from tests.kit.gateway import GatewayBench, running_gateway

BODY = {"model": "table", "input": "words", "max_output_tokens": 60, "seed": 3}


class OrphanStore(MemoryStore):
    """Tells of sessions without a router, as one that routers share does."""

    async def orphans(self, limit: int) -> Sequence[str]:
        every = await self.sessions(100)
        return [one.session_id for one in every if one.finish_reason == ABANDONED][:limit]


async def respond(gateway: GatewayBench, **changes: Any) -> dict[str, Any]:
    answer = await gateway.http.post("/v1/responses", json=BODY | changes)
    assert answer.status_code == 200
    response: dict[str, Any] = answer.json()
    return response


async def get(gateway: GatewayBench, response_id: str) -> dict[str, Any]:
    response: dict[str, Any] = (await gateway.http.get(f"/v1/responses/{response_id}")).json()
    return response


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


@asynccontextmanager
async def orphaned() -> AsyncIterator[tuple[GatewayBench, str, str]]:
    """A gateway, and a response whose router left after its first rounds; and its whole text."""
    async with running_gateway(store=OrphanStore()) as gateway:
        whole = await respond(gateway)
        worker = gateway.bench.verifiers[0]
        before = worker.actions()["step"]
        begun = await respond(gateway, background=True)
        await worker.wait_for("step", before + 3)
        gateway.bench.router.cut()
        async with asyncio.timeout(10):
            await gateway.bench.router.idle()
        yield gateway, begun["id"], text_of(whole)


async def test_an_orphan_is_run_on_to_its_end() -> None:
    async with orphaned() as (gateway, response_id, text):
        so_far = await get(gateway, response_id)
        assert so_far["status"] == "in_progress"
        assert text.startswith(text_of(so_far))
        assert 0 < len(text_of(so_far)) < len(text)
        runs = BackgroundRuns()
        assert await ResponseSweep(gateway.bench.router, runs).sweep() == 1
        async with asyncio.timeout(10):
            await gateway.bench.router.idle()
        ended = await get(gateway, response_id)
        assert (ended["status"], text_of(ended)) == ("incomplete", text)
        # There is nothing left to take over.
        assert await ResponseSweep(gateway.bench.router, runs).sweep() == 0
        await runs.close()


async def test_two_routers_that_look_at_once_run_it_once() -> None:
    async with orphaned() as (gateway, response_id, text):
        runs = BackgroundRuns()
        sweeps = [ResponseSweep(gateway.bench.router, runs) for _ in range(2)]
        assert sum(await asyncio.gather(*(sweep.sweep() for sweep in sweeps))) == 1
        async with asyncio.timeout(10):
            await gateway.bench.router.idle()
        assert text_of(await get(gateway, response_id)) == text
        session_id = response_id.removeprefix("resp_")
        assert (await gateway.bench.store.load(session_id)).owner == 1


async def test_one_that_was_deleted_ends_for_good() -> None:
    async with orphaned() as (gateway, response_id, _):
        await ResponseStore(gateway.bench.store).delete(response_id)
        assert await ResponseSweep(gateway.bench.router, BackgroundRuns()).sweep() == 0
        session_id = response_id.removeprefix("resp_")
        assert (await gateway.bench.store.load(session_id)).finish_reason == CANCELLED


async def test_a_router_that_leaves_or_is_full_takes_nothing_over() -> None:
    async with orphaned() as (gateway, _, _):
        assert await ResponseSweep(gateway.bench.router, BackgroundRuns(0)).sweep() == 0
        await gateway.bench.router.drain()
        assert await ResponseSweep(gateway.bench.router, BackgroundRuns()).sweep() == 0


async def test_it_is_looked_for_now_and_then_and_a_failure_does_not_end_that() -> None:
    class FailsOnce(OrphanStore):
        num_asked = 0
        claimed = asyncio.Event()

        async def orphans(self, limit: int) -> Sequence[str]:
            self.num_asked += 1
            if self.num_asked == 1:
                raise ValueError("cannot be read")
            return await super().orphans(limit)

        async def claim(self, session_id: str, *, orphaned_only: bool = False) -> SessionRecord:
            record = await super().claim(session_id, orphaned_only=orphaned_only)
            self.claimed.set()
            return record

    store = FailsOnce()
    async with running_gateway(store=store) as gateway:
        runs = BackgroundRuns()
        begun = await respond(gateway, background=True)
        gateway.bench.router.cut()
        async with asyncio.timeout(10):
            await gateway.bench.router.idle()
        sweep = ResponseSweep(gateway.bench.router, runs, seconds=0.01)
        sweep.start()
        async with asyncio.timeout(10):
            await store.claimed.wait()
            await gateway.bench.router.idle()
        assert (await get(gateway, begun["id"]))["status"] == "incomplete"
        await sweep.close()
        await runs.close()


@pytest.mark.parametrize("written_down", [True, False])
async def test_an_end_that_nobody_wrote_down_is_told_and_kept(written_down: bool) -> None:
    async with running_gateway() as gateway:
        whole = await respond(gateway)
        keep = ResponseStore(gateway.bench.store)
        if not written_down:
            # Its router died between its last round and this.
            stored = await keep.read(whole["id"])
            stored.response.update(status="in_progress", output=[], usage=None)
            await keep.put(stored)
        assert text_of(await get(gateway, whole["id"])) == text_of(whole)
        assert not (await keep.read(whole["id"])).running
