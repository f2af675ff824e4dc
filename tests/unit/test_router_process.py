"""The router as a process: settings, clear refusals at start, serving, draining at SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from specinfer.admin import AdminClient
from specinfer.client import AsyncClient
from specinfer.errors import InvalidRequest
from specinfer.messages import ShapeQuery, StepCost
from specinfer.server import fastest_loop
from specinfer_router.goodput import AdaptiveShape
from specinfer_router.policy import StaticShape
from specinfer_router.settings import RouterSettings
from tests.conftest import free_port
from tests.kit.fake_drafter import FakeDrafter
from tests.kit.fake_workers import FakeVerifier, info_of

ROOT = Path(__file__).resolve().parents[2]


def test_defaults_stay_on_this_machine() -> None:
    settings = RouterSettings(verify=("127.0.0.1:1",))
    assert (settings.grpc, settings.gateway) == ("127.0.0.1:50051", "127.0.0.1:8000")
    assert not settings.insecure_bind
    assert settings.tls is None
    assert settings.worker_tls is None


def test_the_faster_event_loop_is_taken_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=fastest_loop()) as runner:
        assert isinstance(runner.get_loop(), uvloop.Loop)
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert fastest_loop() is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"verify": ()},
        {"policy": "magic"},
        {"widths": "3,x"},
        {"widths": "0"},
        {"widths": "9,9"},
        {"draft_nodes": 64},
        {"draft_nodes": -1},
        {"max_streams": 0},
        {"session_seconds": 0.0},
        {"session_seconds": float("nan")},
        {"step_deadline": float("inf")},
        {"propose_deadline": -0.1},
        {"drain_seconds": -1.0},
        {"failover_seconds": float("nan")},
        {"max_wait_seconds": 0.0},
        {"max_waiting": -1},
        {"keys": "redis"},
        {"cors_origin": ("*",)},
        {"tls_certificate": Path("a")},
        {"tls_ca": Path("a")},
        {"worker_tls_key": Path("a")},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        RouterSettings(**({"verify": ("127.0.0.1:1",)} | wrong))  # type: ignore[arg-type]


def test_shapes_policies_and_deadlines_come_from_settings() -> None:
    costs = (StepCost(1, 0, 0.05), StepCost(8, 0, 0.06))
    plain = RouterSettings(verify=("127.0.0.1:1",))
    assert isinstance(plain.shape_policy(costs), AdaptiveShape)
    static = RouterSettings(verify=("127.0.0.1:1",), policy="static")
    assert static.shape_policy(costs) == StaticShape(ShapeQuery(max_nodes=12, max_depth=12))
    assert plain.limits(costs).seats.propose_seconds == pytest.approx(0.2)
    assert plain.limits(()).seats.propose_seconds == 0.1
    chosen = RouterSettings(verify=("127.0.0.1:1",), widths="3,2", propose_deadline=0.7)
    assert chosen.shape() == ShapeQuery(max_nodes=9, max_depth=2, widths=(3, 2))
    assert chosen.limits(costs).seats.propose_seconds == 0.7


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'services' / 'router'}"}


async def start_router(*flags: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "specinfer_router", *flags),
        stderr=asyncio.subprocess.PIPE,
        env=environment(),
    )


async def refusal(*flags: str) -> str:
    """What a router that cannot start says; fails when it starts."""
    process = await start_router(*flags)
    async with asyncio.timeout(30):
        _, errors = await process.communicate()
    assert process.returncode == 1
    text = errors.decode()
    assert "Traceback" not in text
    return text


@asynccontextmanager
async def workers() -> AsyncIterator[tuple[FakeVerifier, FakeDrafter]]:
    verifier, drafter = FakeVerifier(info_of("verify")), FakeDrafter(info_of("draft"))
    await verifier.start()
    await drafter.start()
    yield verifier, drafter
    await drafter.stop()
    await verifier.stop()


async def line_with(process: asyncio.subprocess.Process, message: str) -> dict[str, object]:
    """The log line with this message; fails when the log ends first."""
    assert process.stderr is not None
    async with asyncio.timeout(30):
        async for line in process.stderr:
            entry: dict[str, object] = json.loads(line)
            if entry["message"] == message:
                return entry
    pytest.fail(f"no {message!r} in the log")


async def test_a_router_serves_and_drains_at_sigterm() -> None:
    async with workers() as (verifier, drafter):
        process = await start_router(
            *("--grpc", "127.0.0.1:0", "--gateway", "127.0.0.1:0"),
            *("--verify", verifier.address, "--draft", drafter.address),
        )
        serving = await line_with(process, "serving")
        async with AsyncClient(f"127.0.0.1:{serving['grpc_port']}") as client:
            verifier.gate.clear()
            running = asyncio.create_task(client.generate("some words", max_tokens=12))
            await verifier.wait_for("step", 1)
            process.send_signal(signal.SIGTERM)
            await line_with(process, "draining")
            verifier.gate.set()
            completion = await running
            assert len(completion.token_ids) == 12
        async with asyncio.timeout(20):
            assert await process.wait() == 0
        assert not verifier.sessions


async def test_operators_and_metrics_have_ports_of_their_own() -> None:
    async with workers() as (verifier, drafter):
        process = await start_router(
            *("--grpc", "127.0.0.1:0", "--gateway", "127.0.0.1:0", "--admin", "127.0.0.1:0"),
            *("--metrics", "127.0.0.1:0", "--router-id", "router-9"),
            *("--verify", verifier.address, "--draft", drafter.address),
        )
        serving = await line_with(process, "serving")
        async with AdminClient(f"127.0.0.1:{serving['admin_port']}") as operator:
            status = await operator.cluster()
            assert status.router.router_id == "router-9"
            assert [worker.ready for worker in status.workers] == [True, True]
            assert {finding.verdict for finding in await operator.diagnose()} <= {"ok", "warning"}
        async with httpx.AsyncClient(timeout=20) as client:
            own = await client.get(f"http://127.0.0.1:{serving['metrics_port']}/metrics")
            assert "specinfer_build_info" in own.text
            gateway = f"http://127.0.0.1:{serving['gateway_port']}"
            assert (await client.get(f"{gateway}/metrics")).status_code in (401, 404)
            assert (await client.get(f"{gateway}/health/ready")).status_code == 200
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            assert await process.wait() == 0


def test_certificates_alone_make_nobody_an_operator() -> None:
    files: dict[str, Any] = {name: Path(name) for name in ("tls_ca", "tls_certificate", "tls_key")}
    for address in ("0.0.0.0:50052", "127.evil.example:50052", "localhost.evil.example:1"):
        with pytest.raises(InvalidRequest, match="--keys"):
            RouterSettings(verify=("127.0.0.1:1",), admin=address, **files)
    RouterSettings(verify=("127.0.0.1:1",), admin="0.0.0.0:50052", keys="keys.jsonl", **files)
    RouterSettings(verify=("127.0.0.1:1",), admin="127.0.0.1:50052", **files)


async def test_operators_are_answered_while_it_waits_for_a_first_verify_worker() -> None:
    missing = f"127.0.0.1:{free_port()}"
    process = await start_router(
        *("--grpc", "127.0.0.1:0", "--gateway", "127.0.0.1:0", "--admin", "127.0.0.1:0"),
        *("--verify", missing),
    )
    waiting = await line_with(process, "waiting for a verify worker")
    assert waiting["verify"] == missing
    async with AdminClient(f"127.0.0.1:{waiting['admin_port']}") as operator:
        status = await operator.cluster()
        assert "waits for a first verify worker" in status.router.not_ready_reason
        assert [worker.connected for worker in status.workers] == [False]
        found = {finding.check: finding for finding in await operator.diagnose()}
        assert found["verify workers"].verdict == "failed"
        assert missing in found["verify workers"].detail
    process.kill()
    await process.communicate()


async def test_an_admin_port_for_all_needs_keys() -> None:
    flags = ("--grpc", "127.0.0.1:0", "--gateway", "127.0.0.1:0", "--verify", "127.0.0.1:1")
    text = await refusal(*flags, "--admin", "0.0.0.0:0", "--insecure-bind")
    assert "--keys" in text


async def test_a_port_in_use_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        text = await refusal("--grpc", address, "--verify", f"127.0.0.1:{free_port()}")
        assert "in use" in text
        text = await refusal(
            *("--grpc", "127.0.0.1:0", "--gateway", address),
            *("--verify", f"127.0.0.1:{free_port()}"),
        )
        assert "cannot listen" in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--redis", "redis://127.0.0.1:1/0"), "cannot be reached"),
        (("--start-seconds", "0.3"), "no worker was ready"),
        (("--grpc", "0.0.0.0:0"), "--insecure-bind"),
        (("--log-level", "loud"), "log level"),
    ],
    ids=["redis", "no worker", "wide", "log level"],
)
async def test_what_stops_a_start_is_told(flags: tuple[str, ...], expected: str) -> None:
    given = ["--verify", f"127.0.0.1:{free_port()}", "--gateway", "127.0.0.1:0", *flags]
    if "--grpc" not in flags:
        given += ["--grpc", "127.0.0.1:0"]
    assert expected in await refusal(*given)


async def test_a_drafter_with_another_tokenizer_ends_the_start_with_both_hashes() -> None:
    async with workers() as (verifier, drafter):
        drafter.info = info_of("draft", tokenizer_hash="deadbeef")
        text = await refusal(
            *("--grpc", "127.0.0.1:0", "--gateway", "127.0.0.1:0"),
            *("--verify", verifier.address, "--draft", drafter.address),
        )
        assert "deadbeef" in text
        assert verifier.info.tokenizer_hash in text
