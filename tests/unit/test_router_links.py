"""Links to workers: frames that coalesce, one result for each item, reconnecting, and pools."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import grpc.aio
import pytest

from specinfer.errors import (
    InternalError,
    Mismatch,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from specinfer.v1 import verify_pb2
from specinfer_router.cluster import Cluster
from specinfer_router.links import LinkLimits
from tests.conftest import free_port
from tests.kit.fake_drafter import FakeDrafter
from tests.kit.fake_workers import TOKENIZER_JSON, FakeVerifier, info_of, next_token
from tests.kit.links import linked, open_on, step_on
from tests.kit.router import FAST_LINKS


async def test_waiting_items_are_bounded() -> None:
    async with linked(LinkLimits(max_pending=2)) as (worker, link):
        worker.gate.clear()
        waiting = [open_on(link, "a"), open_on(link, "b")]
        with pytest.raises(ResourceExhausted):
            open_on(link, "c")
        worker.gate.set()
        await asyncio.gather(*waiting)
        await open_on(link, "c")


class GarbledVerifier(FakeVerifier):
    """A verify worker whose next frame is no message."""

    garbled = False

    def add_to(self, server: grpc.aio.Server) -> None:
        super().add_to(server)
        verify = grpc.stream_stream_rpc_method_handler(
            self.Verify, verify_pb2.VerifyRequest.FromString, self._bytes
        )
        server.add_registered_method_handlers("specinfer.v1.VerifyService", {"Verify": verify})

    def _bytes(self, message: verify_pb2.VerifyResponse) -> bytes:
        garbled, self.garbled = self.garbled, False
        return b"\xff" if garbled else message.SerializeToString()


async def test_a_frame_that_is_no_message_breaks_the_stream_and_not_the_link() -> None:
    worker = GarbledVerifier(info_of("verify"))
    async with linked(worker=worker) as (_, link):
        await open_on(link, "a")
        worker.garbled = True
        with pytest.raises(Unavailable):
            await step_on(link, "a")
        while link.generation < 2:
            link.attempted.clear()
            await link.attempted.wait()
        await open_on(link, "b")
        await step_on(link, "b")


async def test_each_item_has_its_own_outcome() -> None:
    async with linked() as (_, link):
        good = asyncio.gather(open_on(link, "a"), step_on(link, "a"))
        bad = step_on(link, "nobody")
        _, result = await good
        assert result.token_ids == (next_token([1, 2, 3], 0),)
        with pytest.raises(NotFound):
            await bad


async def test_a_result_for_another_session_fails_its_item_alone() -> None:
    async with linked() as (worker, link):
        await asyncio.gather(open_on(link, "a"), open_on(link, "b"))
        tell = worker._tell

        def confuse(item: Any, result: Any) -> Any:
            wire = tell(item, result)
            wire.session_id = "b"
            return wire

        worker._tell = confuse  # type: ignore[method-assign]
        confused, fine = step_on(link, "a"), step_on(link, "b")
        with pytest.raises(InternalError):
            await confused
        assert (await fine).epoch == 1


async def test_answers_nobody_waits_for_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    async with linked() as (worker, link):
        await open_on(link, "a")
        answer = worker.answer
        unknown = 10**9
        step_on(link, "a")  # and nobody waits for it
        await open_on(link, "b")

        async def rename(item: Any) -> Any:
            result = await answer(item)
            if item.session_id == "strange":
                result.item_id = unknown
            return result

        worker.answer = rename  # type: ignore[method-assign]
        open_on(link, "strange")
        await open_on(link, "c")
        assert "unknown item" in caplog.text
        assert link.connected


async def test_a_broken_stream_fails_what_waits_and_connects_again() -> None:
    async with linked() as (worker, link):
        await open_on(link, "a")
        worker.gate.clear()
        waiting = [step_on(link, "a"), open_on(link, "b")]
        await worker.wait_for("step", 1)
        await worker.kill()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, Unavailable)
        with pytest.raises(Unavailable):
            open_on(link, "c")
        worker.gate.set()
        ready = asyncio.Event()
        link._on_ready = ready.set
        await worker.start()
        async with asyncio.timeout(10):
            await ready.wait()
        await open_on(link, "c")
        assert link.generation == 2


async def test_a_frame_too_large_to_receive_breaks_the_stream_and_nothing_else() -> None:
    async with linked() as (worker, link):
        await open_on(link, "a")
        tell = worker._tell

        def swell(item: Any, result: Any) -> Any:
            wire = tell(item, result)
            wire.token_ids.extend([2**31] * 2_000_000)
            return wire

        worker._tell = swell  # type: ignore[method-assign]
        with pytest.raises(Unavailable):
            await step_on(link, "a")


async def test_closing_ends_everything_that_waits() -> None:
    async with linked() as (worker, link):
        worker.gate.clear()
        waiting = open_on(link, "a")
        await worker.wait_for("open", 1)
        await link.close()
        with pytest.raises(Unavailable):
            await waiting
        worker.gate.set()
    names = [task.get_name() for task in asyncio.all_tasks()]
    assert not any("link" in name for name in names)


async def test_the_tokenizer_comes_in_pieces() -> None:
    async with linked() as (_, link):
        files = await link.fetch_tokenizer()
        assert files.tokenizer_json == TOKENIZER_JSON
        assert (files.eos_token_ids, files.eos_token) == ((0,), "<|end|>")
        assert "messages" in files.chat_template


async def start_cluster(
    verifiers: list[FakeVerifier], drafters: list[FakeDrafter], seconds: float = 5.0
) -> Cluster:
    for worker in (*verifiers, *drafters):
        await worker.start()
    cluster = Cluster(
        [worker.address for worker in verifiers],
        [worker.address for worker in drafters],
        limits=FAST_LINKS,
    )
    try:
        await cluster.start(seconds=seconds)
    except Exception:
        await cluster.close()
        for worker in (*verifiers, *drafters):
            await worker.stop()
        raise
    return cluster


@pytest.mark.parametrize(
    "change", [{"tokenizer_hash": "deadbeef"}, {"vocab_size": 17}], ids=["tokenizer", "vocabulary"]
)
async def test_a_drafter_of_another_kind_is_refused_at_start(change: dict[str, Any]) -> None:
    target, other = info_of("verify"), info_of("draft", **change)
    with pytest.raises(Mismatch) as refused:
        await start_cluster([FakeVerifier(target)], [FakeDrafter(other)])
    for name in change:
        assert str(getattr(other, name)) in refused.value.message
        assert str(getattr(target, name)) in refused.value.message


@pytest.mark.parametrize("field", ["model_hash", "dtype"])
async def test_a_verify_worker_that_differs_from_the_first_is_refused(
    field: str, caplog: pytest.LogCaptureFixture
) -> None:
    workers = [FakeVerifier(info_of("a")), FakeVerifier(info_of("b", **{field: "other"}))]
    cluster = await start_cluster(workers, [])
    fitting, refused = sorted(cluster.workers(), key=lambda status: status.refusal)
    assert (fitting.ready, fitting.refusal) == (True, "")
    assert not refused.connected
    assert field in refused.refusal
    assert refused.address in refused.refusal
    chosen = cluster.verifiers.choose()
    assert chosen is not None
    assert chosen.address == fitting.address
    assert caplog.text.count(refused.refusal) <= 2, "the check and the link each say it once"
    await cluster.close()
    for worker in workers:
        await worker.stop()


async def test_a_drafter_that_mismatches_later_is_kept_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    verifier, drafter = FakeVerifier(info_of("verify")), FakeDrafter(info_of("draft"))
    cluster = await start_cluster([verifier], [drafter])
    link = cluster.drafters.links[0]
    assert link.ready
    await drafter.kill()
    drafter.info = info_of("draft", tokenizer_hash="deadbeef")
    link.attempted.clear()
    await drafter.start()
    async with asyncio.timeout(10):
        while link.refusal is None:
            await link.attempted.wait()
            link.attempted.clear()
    assert cluster.drafters.choose() is None
    assert "deadbeef" in caplog.text
    await cluster.close()
    await drafter.stop()
    await verifier.stop()


async def test_no_verify_worker_at_start_is_told_with_its_address() -> None:
    address = f"127.0.0.1:{free_port()}"
    cluster = Cluster([address], [], limits=FAST_LINKS)
    with pytest.raises(Unavailable, match=address):
        await cluster.start(seconds=0.2)
    await cluster.close()


async def test_a_router_waits_for_a_verify_worker_that_is_still_loading() -> None:
    worker = FakeVerifier(info_of("verify"))
    worker.port = free_port()
    cluster = Cluster([worker.address], [], limits=FAST_LINKS)
    starting = asyncio.create_task(cluster.start(seconds=10))
    await cluster_attempted(cluster)
    await worker.start()
    await starting
    assert cluster.verifiers.num_ready == 1
    await cluster.close()
    await worker.stop()


async def cluster_attempted(cluster: Cluster) -> None:
    await cluster.verifiers.links[0].attempted.wait()


async def test_the_least_loaded_worker_is_chosen() -> None:
    workers = [FakeVerifier(info_of(name)) for name in "abc"]
    cluster = await start_cluster(workers, [])
    links = cluster.verifiers.links
    links[0].num_seats, links[1].num_seats, links[2].num_seats = 2, 1, 3
    assert cluster.verifiers.choose() is links[1]
    assert cluster.verifiers.choose(avoid=links[1]) is links[0]
    for number in range(4):
        workers[1].sessions[f"another router's {number}"] = None  # type: ignore[assignment]
    await links[1].forget("nobody", 0)
    assert cluster.verifiers.choose() is links[0], "sessions of other routers count too"
    workers[0].draining = workers[2].draining = True
    await asyncio.gather(links[0].forget("nobody", 0), links[2].forget("nobody", 0))
    assert cluster.verifiers.choose(avoid=links[1]) is links[1], "the only one left"
    await cluster.close()
    for worker in workers:
        await worker.stop()


async def test_a_worker_that_is_down_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cluster = Cluster([f"127.0.0.1:{free_port()}"], [], limits=FAST_LINKS)
    with pytest.raises(Unavailable):
        await cluster.start(seconds=0.4)
    await cluster.close()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1


async def test_a_result_that_breaks_its_reading_fails_its_item_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(result: object) -> None:
        raise ZeroDivisionError

    async with linked() as (_, link):
        await open_on(link, "a")
        with monkeypatch.context() as patch:
            patch.setattr("specinfer_router.worker_links.verify_result_from_wire", broken)
            with pytest.raises(InternalError, match="cannot be read"):
                async with asyncio.timeout(5):
                    await step_on(link, "a")
        assert "ZeroDivisionError" in caplog.text
        await open_on(link, "b")
        assert link.generation == 1
