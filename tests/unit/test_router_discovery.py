"""Workers that come and go while a router runs, by what a registry lists."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from specinfer.errors import Mismatch, Unavailable
from specinfer.messages import Finished, ResumeRequest, ShapeQuery, Started
from specinfer.metrics import RouterMetrics
from specinfer.registry import RegisteredWorker
from specinfer_router import discovery
from specinfer_router.building import load_tokenizer
from specinfer_router.cluster import Cluster
from specinfer_router.links import LinkLimits
from specinfer_router.opening import SeatLimits
from specinfer_router.policy import StaticShape
from specinfer_router.router import Router, RouterLimits
from specinfer_router.store import MemoryStore
from tests.kit.fake_drafter import FakeDrafter
from tests.kit.fake_registry import FakeRegistry
from tests.kit.fake_workers import FakeVerifier, FakeWorker, continuation, info_of
from tests.kit.router import FAST_LINKS, PROMPT, Bench, request_of
from tests.kit.waiting import until


@asynccontextmanager
async def found_cluster(
    registry: FakeRegistry, *workers: FakeWorker, limits: LinkLimits = FAST_LINKS
) -> AsyncIterator[Cluster]:
    """A started cluster that was given no address; all workers end with it."""
    for worker in workers:
        await worker.start()
        registry.put(worker)
    cluster = Cluster([], [], limits=limits, registry=registry)
    try:
        await cluster.start(seconds=5)
        yield cluster
    finally:
        await cluster.close()
        for worker in workers:
            await worker.stop()


def bench_of(cluster: Cluster, store: MemoryStore, tokenizer: object) -> Bench:
    """A router in front of a started cluster."""
    metrics = CollectorRegistry()
    router = Router(
        cluster,
        store=store,
        tokenizer=tokenizer,  # type: ignore[arg-type]
        policy=StaticShape(ShapeQuery(max_nodes=8, max_depth=5)),
        metrics=RouterMetrics(metrics, "table"),
        version="test",
        limits=RouterLimits(
            max_tree_nodes=32, seats=SeatLimits(propose_seconds=2.0, failover_seconds=0.5)
        ),
    )
    return Bench(router, cluster, store, metrics, [], [])


async def looked(registry: FakeRegistry, num_looks: int = 2) -> None:
    """The list was asked for anew, and what it said was followed."""
    wanted = registry.num_looks + num_looks
    await until(lambda: registry.num_looks >= wanted, "the list is looked at")


async def test_a_start_waits_for_the_first_verify_worker_on_the_list() -> None:
    registry, worker = FakeRegistry(), FakeVerifier(info_of("verify"))
    await worker.start()
    cluster = Cluster([], [], limits=FAST_LINKS, registry=registry)
    starting = asyncio.create_task(cluster.start(seconds=10))
    await looked(registry)
    assert not starting.done()
    registry.put(worker)
    await starting
    (status,) = cluster.workers()
    assert (status.tier, status.worker_id, status.source) == ("verify", "verify", "registry")
    assert status.ready
    await cluster.close()
    await worker.stop()


async def test_a_start_without_workers_says_where_they_are_looked_for() -> None:
    cluster = Cluster([], [], limits=FAST_LINKS, registry=FakeRegistry())
    with pytest.raises(Unavailable, match="none is listed at a list in memory"):
        await cluster.start(seconds=0.2)
    await cluster.close()


async def test_a_drafter_that_comes_later_is_used_and_one_that_dies_is_gone() -> None:
    registry = FakeRegistry()
    verifier, drafter = FakeVerifier(info_of("verify")), FakeDrafter(info_of("draft"))
    async with found_cluster(registry, verifier) as cluster:
        bench = bench_of(cluster, MemoryStore(), await load_tokenizer(cluster, 1000))
        alone = await bench.generate(request_of())
        assert "no_drafter" in alone.reasons
        assert "" not in alone.reasons
        await drafter.start()
        registry.put(drafter)
        await until(lambda: cluster.drafters.num_ready == 1, "the drafter joins")
        helped = await bench.generate(request_of())
        assert "" in helped.reasons
        assert helped.token_ids == alone.token_ids == continuation(PROMPT, 40, 3)
        await drafter.kill()
        del registry.listed["draft"]
        await until(lambda: not cluster.drafters.links, "the drafter leaves")
        bench.router.close()


async def test_the_known_workers_stay_while_the_registry_is_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = FakeRegistry()
    async with found_cluster(registry, FakeVerifier(info_of("verify"))) as cluster:
        registry.away = True
        await looked(registry, 3)
        assert cluster.verifiers.num_ready == 1
        assert caplog.text.count("the known workers stay") == 1
        registry.away = False
        await looked(registry)
        assert cluster.verifiers.num_ready == 1


async def test_a_fault_while_following_does_not_end_it(caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(FakeRegistry):
        faults = 0

        async def workers(self) -> Sequence[RegisteredWorker]:
            listed = await super().workers()
            if self.faults:
                self.faults -= 1
                raise ZeroDivisionError
            return listed

    registry, late = Faulty(), FakeDrafter(info_of("late"))
    async with found_cluster(registry, FakeVerifier(info_of("verify"))) as cluster:
        registry.faults = 2
        await until(lambda: registry.faults == 0, "it has failed")
        await late.start()
        registry.put(late)
        await until(lambda: cluster.drafters.num_ready == 1, "the drafter joins")
        assert caplog.text.count("following the list of workers failed") == 2
        await late.stop()


async def test_a_connected_worker_stays_when_the_registry_has_lost_everything() -> None:
    registry = FakeRegistry()
    one, other = FakeVerifier(info_of("one")), FakeVerifier(info_of("other"))
    async with found_cluster(registry, one, other) as cluster:
        await until(lambda: cluster.verifiers.num_ready == 2, "both joined")
        entries = dict(registry.listed)
        registry.listed.clear()
        await looked(registry, 3)
        assert cluster.verifiers.num_ready == 2
        registry.listed = {"one": entries["one"]}
        await looked(registry)
        # A host that lost its power breaks no stream, so who is listed is preferred.
        listed = next(link for link in cluster.verifiers.links if link.address == one.address)
        listed.num_seats = 50
        assert cluster.verifiers.choose() is listed
        listed.num_seats = 0
        registry.listed = entries
        await looked(registry)
        await other.kill()
        del registry.listed["other"]
        await until(lambda: len(cluster.verifiers.links) == 1, "the dead one is dropped")


async def test_after_the_grace_an_unlisted_worker_keeps_its_sessions_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(discovery, "GRACE_SECONDS", 0.1)
    registry = FakeRegistry()
    async with found_cluster(registry, FakeVerifier(info_of("verify"))) as cluster:
        (link,) = cluster.verifiers.links
        link.num_seats = 1
        registry.listed.clear()
        await until(lambda: not cluster.verifiers.links, "it is retired")
        await looked(registry)
        assert link.connected
        link.num_seats = 0
        await until(lambda: not link.connected, "it is closed after its last session")


async def test_a_draining_worker_gets_no_new_session() -> None:
    registry = FakeRegistry()
    one, other = FakeVerifier(info_of("one")), FakeVerifier(info_of("other"))
    async with found_cluster(registry, one, other) as cluster:
        await until(lambda: cluster.verifiers.num_ready == 2, "both joined")
        registry.put(one, draining=True)
        await until(lambda: cluster.verifiers.num_ready == 1, "it is left alone")
        assert len(cluster.verifiers.links) == 2, "its sessions go on"
        late = FakeVerifier(info_of("late"))
        await late.start()
        registry.put(late, draining=True)
        await looked(registry)
        assert len(cluster.verifiers.links) == 2, "who is leaving is not met"
        await late.stop()


async def test_a_new_process_at_an_old_address_is_met_at_once() -> None:
    registry, worker = FakeRegistry(), FakeVerifier(info_of("first"))
    patient = LinkLimits(min_backoff=600.0, max_backoff=600.0)
    async with found_cluster(registry, worker, limits=patient) as cluster:
        (old,) = cluster.verifiers.links
        await worker.kill()
        await until(lambda: not old.connected, "the stream breaks")
        worker.info = info_of("second")
        await worker.start()
        del registry.listed["first"]
        registry.put(worker)
        await until(lambda: cluster.verifiers.num_ready == 1, "the new process is used")
        (new,) = cluster.verifiers.links
        assert new is not old
        assert new.info is not None
        assert new.info.worker_id == "second"


async def test_a_worker_that_does_not_fit_is_refused_once_and_harms_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = FakeRegistry()
    verifier = FakeVerifier(info_of("verify"))
    strange = FakeDrafter(info_of("strange", tokenizer_hash="deadbeef"))
    fitting = FakeDrafter(info_of("fitting"))
    async with found_cluster(registry, verifier, strange, fitting) as cluster:
        await until(lambda: cluster.drafters.num_ready == 1, "the other one serves")
        by_id = {status.address: status for status in cluster.workers()}
        assert "deadbeef" in by_id[strange.address].refusal
        link = next(link for link in cluster.drafters.links if link.address == strange.address)
        for _ in range(3):
            link.attempted.clear()
            await link.attempted.wait()
        errors = [record for record in caplog.records if record.levelname == "ERROR"]
        assert len(errors) == 1
        chosen = cluster.drafters.choose()
        assert chosen is not None
        assert chosen.address == fitting.address


async def test_only_strange_drafters_in_the_registry_do_not_stop_a_start() -> None:
    registry = FakeRegistry()
    strange = FakeDrafter(info_of("strange", vocab_size=17))
    async with found_cluster(registry, FakeVerifier(info_of("verify")), strange) as cluster:
        assert cluster.drafters.num_ready == 0
        assert cluster.verifiers.num_ready == 1


async def test_given_addresses_are_kept_beside_found_ones() -> None:
    registry = FakeRegistry()
    given, found = FakeVerifier(info_of("given")), FakeVerifier(info_of("found"))
    for worker in (given, found):
        await worker.start()
        registry.put(worker)
    cluster = Cluster([given.address], [], limits=FAST_LINKS, registry=registry)
    await cluster.start(seconds=5)
    await until(lambda: cluster.verifiers.num_ready == 2, "both are there")
    sources = {status.worker_id: status.source for status in cluster.workers()}
    assert sources == {"given": "static", "found": "registry"}
    registry.listed.clear()
    await given.kill()
    await found.kill()
    await until(lambda: len(cluster.verifiers.links) == 1, "the found one is dropped")
    await given.start()
    await until(lambda: cluster.verifiers.num_ready == 1, "the given one is tried again")
    await cluster.close()
    await given.stop()


async def test_when_the_model_is_replaced_a_router_says_so_and_lives() -> None:
    """Every verify worker is replaced by one of another model, under a running router."""
    registry, old = FakeRegistry(), FakeVerifier(info_of("old"))
    new = FakeVerifier(info_of("new", model_hash="another"))
    async with found_cluster(registry, old) as cluster:
        await new.start()
        registry.put(new)
        store = MemoryStore()
        bench = bench_of(cluster, store, await load_tokenizer(cluster, 1000))
        begun = await bench.generate(request_of(max_tokens=5))
        await old.kill()
        del registry.listed["old"]
        await until(lambda: len(cluster.verifiers.links) == 1, "the old model has left")
        await until(lambda: bool(cluster.workers()[0].refusal), "the new one is refused")
        with pytest.raises(Mismatch, match=r"model_hash another.*started anew"):
            await bench.generate(request_of())
        assert cluster.max_session_tokens == 512, "what is refused later is not refused as too long"
        await old.start()
        registry.put(old)
        await until(lambda: cluster.verifiers.num_ready == 1, "the old model is back")
        assert (await bench.generate(request_of())).token_ids == continuation(PROMPT, 40, 3)
        bench.router.close()
    await new.stop()

    # A router that is started anew serves the new model, and the old one's sessions are told.
    registry.listed.clear()
    async with found_cluster(registry, new) as cluster:
        bench = bench_of(cluster, store, await load_tokenizer(cluster, 1000))
        with pytest.raises(Mismatch):
            async with aclosing(
                bench.router.resume(ResumeRequest(begun.started.session_id, 5))
            ) as events:
                assert [event async for event in events if isinstance(event, Started | Finished)]
        bench.router.close()
