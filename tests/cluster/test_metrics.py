"""Every metric of the catalogue, on a live cluster under load: shown, consistent and well named."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections import defaultdict
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample

from specinfer.errors import InvalidRequest, ResourceExhausted
from specinfer.messages import ResumeRequest, Started
from specinfer.metrics import expose
from specinfer.metrics.catalogue import CATALOGUE
from specinfer.metrics.metric import PREFIX, Kind, Source
from specinfer.metrics.vllm import VLLM
from specinfer_router.access import Caller, KeyLimits
from specinfer_router.admission import AdmissionLimits
from specinfer_router.opening import SeatLimits
from specinfer_router.router import RouterLimits
from tests.kit.live_cluster import LiveCluster, live_cluster
from tests.kit.router import Generated, collected, request_of
from tests.kit.waiting import until

# Clusters of their own take a while on a busy machine.
pytestmark = pytest.mark.timeout(300)

PROMPT = "What does textwrap.dedent do, and what is it good for?"
# What nothing makes move here, and where it is made to.
STILL = {
    "breaker_state": "no worker fails here; test_router_counts has some that do",
    "breaker_openings": "as breaker_state",
    "ahead_trees": "nothing is drafted ahead on a CPU; test_draft_ahead does",
    "ahead_passes": "as ahead_trees",
    "ahead_rows": "as ahead_trees",
    "late_trees": "drafters answer in time here; test_router_counts has one that does not",
    "hedged_proposes": "there is one drafter; test_router_faults has two",
    "hedge_wins": "as hedged_proposes",
    "migrations": "no worker fails here; test_router_counts has some that do",
    "takeovers": "no router dies here",
    "lease_losses": "no router is paused here",
    "store_errors": "the store is in memory",
    "store_outages": "the store is in memory",
    "store_outage_seconds": "the store is in memory",
    "store_restores": "the store is in memory",
    "store_memory_usage_ratio": "the store is in memory",
    "num_preemptions": "the pool is large enough",
    "roots_ahead": "the engines here wait to be asked; test_roots_ahead has some that do not",
    "roots_ahead_used": "as roots_ahead",
    "fenced_calls": "nobody is fenced off",
    "num_requests_waiting": "0 once all is served",
    "num_requests_running": "0 once all is served",
    "num_sessions_running": "0 once all is served",
    "num_streams_running": "0 once all is served",
    "worker_sessions": "0 once all is served",
    "num_sessions": "0 once all is served",
    "num_steps_waiting": "0 once all is served",
    "kv_cache_usage_ratio": "0 once all is served",
}


Samples = dict[str, list[Sample]]


@dataclass(frozen=True)
class Seen:
    """What was served, and what each process showed while one request ran and after them all."""

    done: list[Generated]
    during: dict[Source, Samples]
    after: dict[Source, Samples]
    bodies: dict[Source, bytes]


@pytest.fixture(scope="module")
def seen(tiny_pair: tuple[Path, Path]) -> Seen:
    return asyncio.run(serve(tiny_pair))


async def serve(pair: tuple[Path, Path]) -> Seen:
    limits = RouterLimits(
        admission=AdmissionLimits(max_streams=4, max_waiting=16),
        seats=SeatLimits(propose_seconds=10.0),
    )
    async with live_cluster(*pair, limits) as live:
        done = await work(live)
        async with aclosing(live.router.generate(request_of(max_tokens=400))) as events:
            first = [await anext(events) for _ in range(3)]
            during = {source: samples(live.registries[source]) for source in Source}
            done.append(collected([*first, *[event async for event in events]]))
        # A worker forgets a session a moment after its last token was shown.
        await until(lambda: not num_open(live), "the workers have forgotten all sessions")
        after = {source: samples(live.registries[source]) for source in Source}
        bodies = {source: expose(live.registries[source])[0] for source in Source}
    return Seen(done, during, after, bodies)


async def generate(
    live: LiveCluster, seed: int, *, key: str = "", prediction: str = "", num_tokens: int = 48
) -> Generated:
    request = request_of(
        token_ids=tuple(range(20, 60)), seed=seed, max_tokens=num_tokens, prediction=prediction
    )
    async with aclosing(live.router.generate(request, Caller(key))) as events:
        return collected([event async for event in events])


async def work(live: LiveCluster) -> list[Generated]:
    """Some of everything that a router serves."""
    calls = [generate(live, seed, key=f"key{seed % 2}") for seed in range(8)]
    done = await asyncio.gather(*calls, generate(live, 8, key="key0", prediction=PROMPT))
    limited = Caller("limited", KeyLimits(requests_per_minute=1))
    done.append(await generate_as(live, limited))
    with pytest.raises(ResourceExhausted):
        await generate_as(live, limited)
    with pytest.raises(InvalidRequest):
        async with aclosing(live.router.generate(request_of(token_ids=()))) as events:
            await anext(events)
    await resume(live, done[0].started)
    return done


async def generate_as(live: LiveCluster, caller: Caller) -> Generated:
    async with aclosing(live.router.generate(request_of(max_tokens=4), caller)) as events:
        return collected([event async for event in events])


async def resume(live: LiveCluster, started: Started) -> None:
    request, caller = ResumeRequest(started.session_id, 10), Caller("key0")
    async with aclosing(live.router.resume(request, caller)) as events:
        assert sum([1 async for _ in events]) > 2


def samples(registry: CollectorRegistry) -> Samples:
    found: Samples = defaultdict(list)
    for family in registry.collect():
        for sample in family.samples:
            found[sample.name].append(sample)
    return found


def total(found: Samples, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for sample in found[PREFIX + name]
        if all(sample.labels[label] == value for label, value in labels.items())
    )


def num_open(live: LiveCluster) -> float:
    """Sessions that the workers still hold."""
    workers = (Source.VERIFY, Source.DRAFT)
    return sum(total(samples(live.registries[source]), "num_sessions") for source in workers)


def test_every_metric_is_shown_and_moves(seen: Seen) -> None:
    for source, found in seen.after.items():
        for metric in CATALOGUE:
            if source not in metric.sources:
                assert metric.shown not in found
                continue
            name = f"{metric.shown}_count" if metric.kind is Kind.HISTOGRAM else metric.shown
            moved = any(sample.value for sample in found[name])
            assert moved or metric.name in STILL, f"{metric.name} does not move at {source}"
            if metric.name != "migrations":
                assert found[name], f"{source} does not show {metric.name}"
        assert found["process_resident_memory_bytes"]


def test_gauges_say_what_runs(seen: Seen) -> None:
    during, after = seen.during, seen.after
    router = during[Source.ROUTER]
    assert total(router, "num_requests_running") == 1
    assert total(router, "num_sessions_running") == 1
    assert total(router, "num_streams_running", kind="generate") == 1
    assert total(router, "worker_sessions", tier="verify") == 1
    assert total(router, "num_workers", state="ready") == 2
    for source in (Source.VERIFY, Source.DRAFT):
        assert total(during[source], "num_sessions") == 1
        assert total(during[source], "kv_blocks", state="used") > 0
        assert 0 < total(during[source], "kv_cache_usage_ratio") <= 1
    for name in ("num_requests_running", "num_sessions_running", "num_streams_running"):
        assert total(after[Source.ROUTER], name) == 0


def test_nothing_is_shown_that_the_catalogue_does_not_name(seen: Seen) -> None:
    bounds = {metric.shown: metric for metric in CATALOGUE}
    for source, found in seen.after.items():
        fixed = {"model_name", "le"} | (set() if source is Source.ROUTER else {"tier"})
        for name, each in found.items():
            if not name.startswith(PREFIX):
                assert name.startswith((VLLM, "process_")), name
                continue
            metric = bounds.get(name) or bounds[name.rpartition("_")[0]]
            allowed = {label.name: label for label in metric.labels}
            assert all(set(sample.labels) <= fixed | set(allowed) for sample in each)
            for label in metric.labels:
                values = {sample.labels[label.name] for sample in each}
                assert len(values) <= label.num_values
                assert not label.values or values <= {*label.values, "other"}


def test_the_counters_agree_with_each_other(seen: Seen) -> None:
    done = seen.done
    found = seen.after[Source.ROUTER]
    speculation = [each.finished.speculation for each in done]
    draft = total(found, "spec_decode_num_draft_tokens_total")
    accepted = total(found, "spec_decode_num_accepted_tokens_total")
    drafts = total(found, "spec_decode_num_drafts_total")
    # The session that is resumed had ended: no round is made again.
    assert draft == sum(each.num_draft_tokens for each in speculation)
    assert accepted == sum(each.num_accepted_tokens for each in speculation)
    assert drafts == sum(each.num_drafts for each in speculation)
    assert 0 < accepted < draft
    assert total(found, "spec_decode_num_accepted_tokens_per_pos_total") == accepted
    assert total(found, "spec_decode_num_drafts_per_pos_total", position="0") == drafts
    assert total(found, "spec_decode_num_draft_tokens_per_rank_total") == draft
    assert total(found, "spec_decode_num_accepted_tokens_per_rank_total") == accepted
    for position in map(str, range(32)):
        reached = total(found, "spec_decode_num_drafts_per_pos_total", position=position)
        name = "spec_decode_num_accepted_tokens_per_pos_total"
        assert total(found, name, position=position) <= reached
    assert total(found, "drafter_draft_tokens_total") == draft
    assert total(found, "drafter_accepted_tokens_total") == accepted
    assert total(found, "drafter_draft_tokens_total", drafter="prediction") > 0
    assert total(found, "wasted_draft_tokens_total", reason="rejected") == draft - accepted
    assert total(found, "tree_nodes_sum") == draft
    rounds = total(found, "tokens_per_round_count")
    assert drafts + total(found, "root_only_rounds_total") >= rounds
    tokens = total(found, "generation_tokens_total")
    assert tokens == total(found, "tokens_per_round_sum") == sum(len(e.token_ids) for e in done)
    assert tokens == accepted + rounds - sum(_cut(each) for each in done)
    parts, whole = total(found, "round_seconds_sum"), total(found, "round_duration_seconds_sum")
    assert parts == pytest.approx(whole)
    assert total(found, "key_tokens_total", kind="generation") == tokens
    assert total(found, "key_requests_total", key="key1") == 4
    assert total(found, "admission_refusals_total", reason="requests_per_minute") == 1
    assert total(found, "inter_event_seconds_count") == rounds - len(done)


def _cut(each: Generated) -> int:
    """Rounds whose tail the end of the text cut off, leaving accepted tokens alone."""
    return sum(event.num_accepted_tokens == len(event.token_ids) for event in each.rounds)


def test_the_workers_agree_with_the_router(seen: Seen) -> None:
    router = seen.after[Source.ROUTER]
    verify = seen.after[Source.VERIFY]
    draft = seen.after[Source.DRAFT]
    rounds = total(router, "tokens_per_round_count")
    assert total(verify, "rows_total", kind="root") == rounds
    guessed = total(router, "spec_decode_num_draft_tokens_total")
    assert total(verify, "rows_total", kind="guess") <= guessed
    assert total(verify, "rows_total") == total(verify, "step_rows_sum")
    assert total(verify, "step_seconds_count") == total(verify, "step_cost_ratio_count")
    assert (
        0 < total(verify, "prefix_cache_hits_total") < total(verify, "prefix_cache_queries_total")
    )
    assert total(verify, "kv_blocks") == 256
    assert total(draft, "proposals_total") == total(draft, "proposal_seconds_count")
    own = total(router, "drafter_draft_tokens_total") - total(
        router, "drafter_draft_tokens_total", drafter="prediction"
    )
    assert total(draft, "proposed_tokens_total") == own


def test_vllms_names_have_our_values(seen: Seen) -> None:
    for source, found in seen.after.items():
        for metric in CATALOGUE:
            if not metric.vllm or source not in metric.sources or metric.name == "requests":
                continue
            suffixes = {Kind.COUNTER: ["_total"], Kind.GAUGE: [""]}
            for suffix in suffixes.get(metric.kind, ["_bucket", "_sum", "_count"]):
                ours, theirs = found[metric.family + suffix], found[VLLM + metric.vllm + suffix]
                assert ours
                assert [each.value for each in ours] == [each.value for each in theirs]
                for mine, alias in zip(ours, theirs, strict=True):
                    labels = {**mine.labels, "engine": "0"}
                    labels.pop("tier", None)
                    assert alias.labels == labels
    found = seen.after[Source.ROUTER]
    finished = {
        sample.labels["finished_reason"]: sample.value
        for sample in found[f"{VLLM}request_success_total"]
    }
    # One of them was resumed once more.
    assert finished["length"] + finished["stop"] == len(seen.done) + 1
    assert finished["error"] == 2


@pytest.mark.parametrize("source", list(Source))
def test_promtool_finds_nothing(seen: Seen, source: Source) -> None:
    promtool = shutil.which("promtool")
    if promtool is None and os.environ.get("CI"):
        pytest.fail("promtool is not installed, and CI must have it")
    if promtool is None:
        pytest.skip("promtool is not installed")
    # Colons are for recording rules, says the linter; vLLM sees that differently.
    lines = seen.bodies[source].splitlines(keepends=True)
    ours = b"".join(line for line in lines if b"vllm:" not in line)
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=ours, capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
