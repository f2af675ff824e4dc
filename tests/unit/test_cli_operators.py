"""top, doctor and sessions against a router with an admin port, run as commands."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from specinfer.admin import AdminClient
from specinfer.errors import InvalidCheckpoint, InvalidRequest, NotFound, PermissionDenied
from specinfer.messages.admin import ClusterStatus, RouterStatus, SessionStatus
from specinfer.redis_connection import RedisSettings
from specinfer.sampling import SamplingParams, StopConditions
from specinfer.server import build_server
from specinfer_cli.app import app
from specinfer_cli.memory_plan import plan_memory
from specinfer_cli.sessions import state
from specinfer_cli.top import Look, picture, rates, store_state, worker_state
from specinfer_router.admin import Administration, Identity, session_status
from specinfer_router.admin_servicer import SERVICE, add_administration
from specinfer_router.keys.control import AccessControl
from specinfer_router.keys.file import KeyFile
from specinfer_router.servicer import SERVICE as GENERATION
from specinfer_router.servicer import add_generation
from specinfer_router.store import MemoryStore, RedisStore, SessionRecord, SessionTerms
from tests.kit.router import Bench, request_of, running_router
from tests.unit.test_diagnosis import worker
from tests.unit.test_roles import keys_in

DEMO = Path(__file__).resolve().parents[2] / "models/demo"


@dataclass
class Served:
    """A router, and where its ports are."""

    bench: Bench
    address: str

    async def run(self, *arguments: str) -> Result:
        """The command's result; it has an event loop of its own, so it runs in a thread."""
        return await asyncio.to_thread(lambda: CliRunner().invoke(app, list(arguments)))

    async def json(self, *arguments: str) -> Any:
        result = await self.run(*arguments, "--json")
        assert result.stdout, result.output
        return json.loads(result.stdout)


@asynccontextmanager
async def served(access: AccessControl | None = None) -> AsyncIterator[Served]:
    async with running_router() as bench:
        server = build_server("127.0.0.1:0", [SERVICE, GENERATION])
        administration = Administration(
            Identity("router-1", "test"),
            cluster=bench.cluster,
            store=bench.store,
            get_router=lambda: bench.router,
            registry=bench.registry,
        )
        add_administration(server, administration, access)
        add_generation(server, bench.router, access)
        await server.start()
        yield Served(bench, f"127.0.0.1:{server.port}")
        await server.server.stop(0)


async def test_sessions_are_listed_shown_and_cancelled() -> None:
    async with served() as at:
        ended = await at.bench.generate(request_of(max_tokens=9))
        async with aclosing(at.bench.router.generate(request_of(max_tokens=400))) as events:
            running = (await anext(events)).session_id  # type: ignore[union-attr]
            found = (await at.json("sessions", "list", "--admin", at.address))["sessions"]
            states = {session["session_id"]: session["finish_reason"] for session in found}
            assert states == {ended.started.session_id: "length", running: ""}
            listed = await at.json("sessions", "list", "--admin", at.address, "--running")
            only = listed["sessions"]
            assert not listed["partial"]
            cut = await at.json("sessions", "list", "--admin", at.address, "--limit", "1")
            assert (len(cut["sessions"]), cut["partial"]) == (1, True)
            past = await at.run(
                "sessions", "cancel", ended.started.session_id, "--admin", at.address
            )
            assert "had already ended (length)" in past.stderr
            assert [session["session_id"] for session in only] == [running]

            shown = await at.run("sessions", "show", running, "--admin", at.address)
            assert shown.exit_code == 0, shown.output
            assert running in shown.stdout
            cancelled = await at.run("sessions", "cancel", running, "--admin", at.address)
            assert cancelled.exit_code == 0, cancelled.output
            last = [event async for event in events][-1]
            assert last.reason == "cancelled"  # type: ignore[union-attr]
        table = await at.run("sessions", "list", "--admin", at.address)
        assert "cancelled" in table.stdout
        missing = await at.run("sessions", "show", "nobody", "--admin", at.address)
        assert missing.exit_code == 1
        assert "no session nobody" in missing.stderr


async def test_top_shows_the_router_its_workers_and_what_happened() -> None:
    async with served() as at:
        await at.bench.generate(request_of(max_tokens=9))
        (facts,) = await at.json("top", "--admin", at.address, "--interval", "0.1")
        router = facts["router"]
        assert (router["router_id"], router["num_tokens"]) == ("router-1", 9)
        assert router["num_requests"] == {"length": 1}
        assert 0 < router["num_accepted_tokens"] <= router["num_draft_tokens"]
        assert {item["tier"] for item in facts["workers"]} == {"verify", "draft"}
        screen = await at.run("top", "--admin", at.address, "--interval", "0.1", "--once")
        assert screen.exit_code == 0, screen.output
        for word in ("router-1", "tokens/round", "verify", "draft", "ready", "measured"):
            assert word in screen.stdout
        lost = await at.json("top", "--admin", "127.0.0.1:1", "--interval", "0.1")
        assert lost[0]["trouble"]


async def test_doctor_has_a_verdict_for_each_line_and_fails_when_one_does() -> None:
    async with served() as at:
        flags = ("--admin", at.address, "--router", at.address, "--gateway", "")
        found = await at.json("doctor", *flags, "--model", str(DEMO / "target"))
        checks = {finding["check"]: finding["verdict"] for finding in found}
        assert checks[f"admin port {at.address}"] == "ok"
        assert checks["tokenizers"] == "ok"
        assert checks["clock of this machine"] == "ok"
        assert checks[f"memory for {DEMO / 'target'}"] == "ok"
        # The fakes are of another version, and one verify worker is one too few.
        assert checks["verify workers"] == "warning"
        assert (await at.run("doctor", *flags)).exit_code == 0

        await at.bench.verifiers[0].stop()
        async with asyncio.timeout(20):
            while at.bench.cluster.verifiers.num_ready:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0)
        broken = await at.run("doctor", *flags)
        assert broken.exit_code == 1
        assert "start one; nothing is served without the target" in broken.stdout
        elsewhere = await at.run("doctor", "--admin", "127.0.0.1:1", *flags[2:])
        assert elsewhere.exit_code == 1
        await at.bench.verifiers[0].start()


async def test_operators_need_their_role(tmp_path: Path) -> None:
    keys = await keys_in(tmp_path / "keys")
    access = AccessControl(KeyFile(tmp_path / "keys"))
    await access.start()
    async with served(access) as at:
        refused = await at.run("sessions", "list", "--admin", at.address, "--api-key", keys["user"])
        assert refused.exit_code == 1
        assert "--role operator" in refused.stderr
        allowed = await at.run(
            "sessions", "list", "--admin", at.address, "--api-key", keys["operator"]
        )
        assert allowed.exit_code == 0, allowed.output
        async with AdminClient(at.address, api_key=keys["user"]) as client:
            with pytest.raises(PermissionDenied):
                await client.cluster()
        async with AdminClient(at.address, api_key=keys["operator"]) as client:
            with pytest.raises(NotFound):
                await client.cancel("nobody")
    await access.close()


def test_a_key_is_not_sent_elsewhere_in_plain_text() -> None:
    with pytest.raises(InvalidRequest):
        AdminClient("example.org:50052", api_key="sk-secret")


class HangingStore(MemoryStore):
    """Never says whether it is there."""

    async def check(self) -> None:
        await asyncio.Event().wait()


async def test_a_store_that_hangs_does_not_hang_operators() -> None:
    async with running_router(store=HangingStore()) as bench:
        administration = Administration(
            Identity("router-1", "test"),
            cluster=bench.cluster,
            store=bench.store,
            get_router=lambda: bench.router,
            registry=bench.registry,
        )
        async with asyncio.timeout(5):
            status = await administration.cluster()
    assert not status.router.store_ready


def test_a_store_that_is_away_is_told_in_words() -> None:
    router = RouterStatus("r", "1", store="redis:6379", store_ready=False)
    assert store_state(router) == "redis:6379 does not answer"
    assert store_state(replace(router, store_away_seconds=12.0)) == "redis:6379 away 12 s"


def test_names_are_no_markup() -> None:
    router = RouterStatus("[/x]", "1", model_name="a\x1b[2J")
    workers = (worker("verify", "[fd00::12]:50061"),)
    seen = [Look("a", 1.0, ClusterStatus(router, workers))]
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(picture(seen, seen))
    text = console.export_text()
    assert "[/x]" in text
    assert "[fd00::12]:50061" in text
    assert "\x1b" not in text


def test_top_fails_when_nobody_answers_and_takes_a_list() -> None:
    environment = {"SPECINFER_ADMIN": "127.0.0.1:1,127.0.0.1:2"}
    flags = ["top", "--once", "--interval", "0.1", "--json"]
    result = CliRunner().invoke(app, flags, env=environment)
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)) == 2


@pytest.mark.parametrize(
    "command", [["generate", "a"], ["chat"], ["explain", "a"], ["top"], ["doctor"]]
)
def test_a_certificate_needs_its_key_and_a_key_needs_tls(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--tls-certificate", "a.pem"])
    assert result.exit_code == 2
    assert "--tls-key" in result.stderr
    admin = command[0] in ("top", "doctor")
    far = ["--admin" if admin else "--router", "far.example:1", "--api-key", "sk-a"]
    result = CliRunner().invoke(app, [*command, *far])
    assert result.exit_code == 2
    assert "--tls-ca FILE" in result.stderr


def look(at: float, **counts: Any) -> Look:
    router = RouterStatus("r", "1", uptime_seconds=at, **counts)
    return Look("a", at, ClusterStatus(router))


def test_rates_are_differences_between_two_looks() -> None:
    before = look(1.0, num_tokens=10, num_rounds=5, num_requests={"stop": 1})
    now = look(
        3.0,
        num_tokens=50,
        num_rounds=15,
        num_requests={"stop": 3, "unavailable": 2},
        num_draft_tokens=40,
        num_accepted_tokens=30,
        num_root_only_rounds={"deadline": 5},
    )
    found = rates(before, now)
    assert (found.tokens, found.requests, found.failed) == (20.0, 2.0, 1.0)
    assert (found.tokens_per_round, found.acceptance, found.root_only) == (4.0, 0.75, 0.5)


def test_a_router_that_was_started_anew_has_no_rates() -> None:
    before, now = look(100.0, num_tokens=1000), look(101.0, num_tokens=5)
    assert now.status is not None
    restarted = replace(now.status.router, uptime_seconds=1.0)
    again = replace(now, status=ClusterStatus(restarted))
    assert rates(before, again).tokens == 0.0
    assert rates(before, Look("a", 2.0, trouble="away")).tokens == 0.0


def test_words_for_workers_and_sessions() -> None:
    assert worker_state(worker("draft", "d"))[0] == "ready"
    assert worker_state(worker("draft", "d", breaker="open"))[0] == "open"
    assert worker_state(worker("draft", "d", connected=False))[0] == "lost"
    assert worker_state(worker("draft", "d", refusal="other"))[0] == "refused"
    assert state(SessionStatus("a", lease_seconds=3.0)) == "running"
    assert state(SessionStatus("a")) == "without a router"
    assert state(SessionStatus("a", unattended=True)) == "waits for a router"
    assert state(SessionStatus("a", finish_reason="stop")) == "stop"


def test_the_memory_plan_of_the_demo_pair() -> None:
    plan = plan_memory(DEMO / "target", "bfloat16")
    config = json.loads((DEMO / "target/config.json").read_text())
    assert plan.weight_bytes == 2 * plan.num_parameters
    assert 8e6 < plan.num_parameters < 10e6
    per_token = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"]
    assert plan.bytes_per_token % per_token == 0
    assert plan.session_bytes == plan.bytes_per_token * plan.max_model_len
    assert plan_memory(DEMO / "target", "float32").weight_bytes == 2 * plan.weight_bytes
    small = plan_memory(DEMO / "target", "bfloat16", "fp8")
    assert (small.weight_bytes, 2 * small.session_bytes) == (plan.weight_bytes, plan.session_bytes)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_folder_that_is_no_checkpoint_has_no_plan(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InvalidCheckpoint):
        plan_memory(tmp_path, "float32")
    (tmp_path / "config.json").write_text((DEMO / "target/config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidCheckpoint):
        plan_memory(tmp_path, "float32")


async def test_sessions_in_redis_are_summed_up_alone_and_together(redis_server: str) -> None:
    store = RedisStore(RedisSettings(redis_server), holder="router-7", lease_seconds=30.0)
    terms = SessionTerms(
        "hash",
        2,
        SamplingParams(seed=1),
        StopConditions(max_tokens=9),
        request_id="request-7",
        unattended=True,
    )
    await store.create(SessionRecord("summed-up", terms, (1, 2)))
    await store.commit("summed-up", 0, [3, 4, 5])
    found = session_status(await store.summary("summed-up"))
    assert (found.request_id, found.max_tokens, found.unattended) == ("request-7", 9, True)
    assert (found.num_prompt_tokens, found.num_output_tokens, found.epoch) == (2, 3, 1)
    assert found.holder == "router-7"
    assert 20 < found.lease_seconds <= 30
    listed = [summary.session_id for summary in await store.sessions(1000)]
    assert "summed-up" in listed
    with pytest.raises(NotFound):
        await store.summary("nobody")
    await store.close()
