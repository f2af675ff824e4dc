"""Through the whole cluster: JSON that its schema allows, equal with speculation on and off."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from specinfer import AsyncClient, Completion
from specinfer.errors import InvalidRequest
from specinfer.messages import Grammar, SpeculationOptions, SpeculationSummary, Usage
from specinfer.options import GenerateOptions
from specinfer_bench.shapes import SHAPES
from specinfer_bench.structured import (
    SCHEMAS,
    all_cases,
    measure,
    run_cases,
    what_is_wrong,
)
from specinfer_cli.cluster import ClusterSettings, RunningCluster, running_cluster
from tests.cluster.test_faults import two_verifiers, with_a_verifier_killed

# Clusters of their own take a while on a busy machine.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster(tiny_settings: ClusterSettings) -> Iterator[RunningCluster]:
    with running_cluster(tiny_settings) as running:
        yield running


async def test_every_schema_is_met_and_speculation_changes_no_token(
    cluster: RunningCluster,
) -> None:
    async with AsyncClient(cluster.router) as client:
        findings = await run_cases(client, all_cases(3 * len(SCHEMAS)), concurrency=6)
    assert findings.failures == []
    assert findings.clean
    assert findings.num_valid == findings.num_equal == 24
    assert set(findings.valid_by_schema) == set(SCHEMAS)
    assert all(counts.num_accepted_tokens > 24 for counts in findings.by_shape.values())


async def test_the_report_is_json_and_says_what_was_measured(cluster: RunningCluster) -> None:
    report = json.loads(json.dumps(await measure(cluster.router, len(SCHEMAS), 8)))
    assert report["clean"]
    assert report["num_valid"] == report["num_requests"] == len(SCHEMAS)
    assert set(report["shapes"]) == set(SHAPES)
    for counts in report["shapes"].values():
        assert 1 <= counts["tokens_per_round"] == counts["num_tokens"] / counts["num_rounds"]


@pytest.mark.parametrize(
    ("grammar", "allowed"),
    [
        (Grammar("choice", '["yes", "no", "maybe so"]'), ("yes", "no", "maybe so")),
        (Grammar("regex", "(ab|cd){2}"), ("abab", "abcd", "cdab", "cdcd")),
        (Grammar("lark", 'start: "<" ("x" | "y") ">"'), ("<x>", "<y>")),
    ],
)
async def test_the_other_kinds_hold_too(
    grammar: Grammar, allowed: tuple[str, ...], cluster: RunningCluster
) -> None:
    seen = set()
    async with AsyncClient(cluster.router) as client:
        for seed in range(6):
            runs = [
                await client.generate(
                    "Well?", grammar=grammar, temperature=1.5, seed=seed, speculation=on
                )
                for on in (True, False)
            ]
            assert runs[0].token_ids == runs[1].token_ids
            assert runs[0].text in allowed
            assert runs[0].finish_reason == "stop"
            seen.add(runs[0].text)
    assert len(seen) > 1, "the model chooses"


async def test_a_bad_grammar_and_one_that_never_ends_are_refused_at_once(
    cluster: RunningCluster,
) -> None:
    async with AsyncClient(cluster.router) as client:
        with pytest.raises(InvalidRequest, match="grammar") as caught:
            await client.generate("x", grammar=Grammar("regex", "(a"))
        assert caught.value.field == "grammar"
        with pytest.raises(InvalidRequest) as caught:
            await client.generate("x", grammar=Grammar("json_object"), ignore_eos=True)
        assert caught.value.field == "ignore_eos"


async def test_killing_a_verifier_in_the_middle_costs_no_token(
    tiny_settings: ClusterSettings,
) -> None:
    """The other worker begins within the grammar, from the output that there is."""
    first: GenerateOptions = {
        "token_ids": [5, 9, 12],
        "seed": 1,
        "max_tokens": 400,
        "temperature": 0.9,
        "grammar": Grammar("regex", "([a-z]{3}-[0-9]{2},){30}"),
        "speculation": SpeculationOptions(widths=(2, 1, 1)),
    }
    second: GenerateOptions = {**first, "seed": 2}
    with running_cluster(two_verifiers(tiny_settings)) as running:
        async with AsyncClient(running.router) as client:
            unbroken = [await client.generate(**options) for options in (first, second)]
            broken = await with_a_verifier_killed(running, client, (first, second))
    assert [run.token_ids for run in broken] == [run.token_ids for run in unbroken * 2]
    for run in unbroken:
        assert re.fullmatch("([a-z]{3}-[0-9]{2},){30}", run.text)
        assert run.speculation.num_accepted_tokens > 0


@pytest.mark.parametrize(
    ("text", "reason", "wrong"),
    [
        ('{"topic": "files", "certain": true}', "stop", ""),
        ('{"topic": "files"}', "stop", "required"),
        ('{"topic": "maths", "certain": true}', "stop", "not one of"),
        ('{"topic": "files", "cer', "stop", "not JSON"),
        ('{"topic": "files", "certain": true}', "length", "ended by length"),
    ],
)
def test_the_judge_sees_what_is_wrong(text: str, reason: str, wrong: str) -> None:
    completion = Completion(
        text=text,
        token_ids=(),
        finish_reason=reason,
        stop_match="",
        seed=0,
        request_id="r",
        session_id="s",
        model="m",
        usage=Usage(),
        speculation=SpeculationSummary(),
        logprobs=(),
        rounds=(),
    )
    found = what_is_wrong(SCHEMAS["enums"][1], completion)
    assert wrong in found
    assert bool(found) == bool(wrong)
