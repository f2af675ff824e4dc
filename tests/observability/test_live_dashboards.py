"""Every panel and every rule on a live Prometheus that scrapes a live cluster under load.

An expression fails when Prometheus does not take it, when a variable in it has no value, and when
nothing finite comes of it. Errors are made on purpose, so that their panels have something to show.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from build_dashboards import DASHBOARDS
from specinfer import AsyncClient, SpeculationOptions
from specinfer.errors import SpecinferError
from specinfer_bench.chaos.cluster import ClusterOptions
from specinfer_bench.chaos.readings import Case
from specinfer_dashboards.grafana import variables_of
from tests.kit.observed_cluster import Observed, observed_cluster
from tests.kit.prometheus import RULES, Prometheus, QueryFailed
from tests.kit.waiting import until

# A cluster of processes starts and serves for a while, which takes long on a busy machine.
pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]

CASES = tuple(
    Case(prompt, temperature, seed, 120)
    for seed, (prompt, temperature) in enumerate(
        [("one", 0.0), ("two and", 0.8), ("three or more", 0.0), ("a longer text", 0.8)]
    )
)
RATE_INTERVAL, RANGE = "15s", "2m"
SHOWN_SECONDS = 60.0
SELECTOR = re.compile(r"(?:specinfer_\w+|model:\w+:\w+|\bup\b)(?:\{[^}]*\})?")


@dataclass(frozen=True)
class Seen:
    """What became of each expression: "" when it showed something, else what was wrong."""

    panels: dict[str, str]
    selectors: dict[str, str]
    rules: list[dict[str, Any]]
    controls: dict[str, str]
    variables: dict[str, list[str]]


CONTROLS = {
    "misspelt metric": 'sum(rate(specinfer_request_total{model_name=~"$model_name"}[15s]))',
    "misspelt label": "sum(specinfer_num_workers{teir=~'.+'})",
    "parse error": "sum(rate(specinfer_requests_total[15s])",
    "variable": 'sum(specinfer_num_workers{instance=~"$instance"})',
    "not a number": "0 * sum(specinfer_num_workers) / 0",
    "none": "sum(specinfer_num_workers)",
}


@pytest.fixture(scope="module")
def seen(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return asyncio.run(look(tiny_pair, tmp_path_factory.mktemp("observed")))


async def look(pair: tuple[Path, Path], folder: Path) -> Seen:
    options = ClusterOptions(
        *pair, num_routers=1, num_verifiers=2, num_drafters=1, worker_flags=("--block-size", "4")
    )
    async with observed_cluster(folder, options, CASES) as observed:
        await go_wrong(observed)
        values = await resolved(observed.prometheus)
        expressions = {
            f"{board.title}: {panel.title} {index}": query.expression
            for board in DASHBOARDS
            for panel in board.panels
            for index, query in enumerate(panel.queries)
        }
        asked = observed.prometheus
        panels = await judged(asked, expressions, values)
        await until(lambda: evaluated(asked), "every rule is evaluated", 30.0)
        selectors = {each: each for rule in rule_expressions() for each in SELECTOR.findall(rule)}
        return Seen(
            panels,
            await judged(asked, selectors, values),
            await asked.rules(),
            {name: await verdict(asked, text, values) for name, text in CONTROLS.items()},
            values,
        )


async def go_wrong(observed: Observed) -> None:
    """A worker that dies under load, a request that cannot be, and some without guesses."""
    async with AsyncClient(observed.cluster.routers) as client:
        for seed in range(3):
            await client.generate(
                "plainly", max_tokens=20, seed=seed, speculation=SpeculationOptions(enabled=False)
            )
        with pytest.raises(SpecinferError):
            await client.generate("", max_tokens=10)
    (victim,) = observed.cluster.matching("verify 1")
    await victim.kill()


async def resolved(asked: Prometheus) -> dict[str, list[str]]:
    """The values that Grafana would offer for each variable."""
    info = "specinfer_build_info"
    values = {"model_name": await asked.label_values("model_name", info)}
    for source in ("router", "verify", "draft"):
        series = f'{info}{{source="{source}"}}'
        values[source] = await asked.label_values("instance", series)
    return values


async def judged(
    asked: Prometheus, expressions: dict[str, str], values: dict[str, list[str]]
) -> dict[str, str]:
    """A verdict on each; what is empty is asked again until the time is up."""
    deadline = time.monotonic() + SHOWN_SECONDS
    found = {name: "" for name in expressions}
    left = set(expressions)
    while left:
        for name in sorted(left):
            found[name] = await verdict(asked, expressions[name], values)
        left = {name for name in left if found[name] == "empty"}
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(1.0)
    return found


async def verdict(asked: Prometheus, expression: str, values: dict[str, list[str]]) -> str:
    text = expression.replace("$__rate_interval", RATE_INTERVAL).replace("$__range", RANGE)
    for name, options in values.items():
        text = text.replace(f"${name}", "|".join(map(re.escape, options)).replace("\\", "\\\\"))
    if unknown := variables_of(text):
        return f"variables without a value: {unknown}"
    try:
        return "" if await asked.instant(text) else "empty"
    except QueryFailed as error:
        return str(error)


async def evaluated(asked: Prometheus) -> bool:
    return all(rule["health"] != "unknown" for rule in await asked.rules())


def rule_expressions() -> list[str]:
    files = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in RULES.glob("*.yml"))
    return [rule["expr"] for file in files for group in file["groups"] for rule in group["rules"]]


def test_no_panel_is_empty_and_no_query_wrong(seen: Seen) -> None:
    assert {name: what for name, what in seen.panels.items() if what} == {}
    assert len(seen.panels) > 100


def test_every_variable_has_values(seen: Seen) -> None:
    assert {name: len(values) for name, values in seen.variables.items()} == {
        "model_name": 1,
        "router": 1,
        "verify": 2,
        "draft": 1,
    }


def test_every_rule_is_evaluated_without_an_error(seen: Seen) -> None:
    assert [rule for rule in seen.rules if rule["health"] != "ok"] == []
    assert len(seen.rules) == len(rule_expressions())


def test_every_series_that_a_rule_asks_for_is_there(seen: Seen) -> None:
    assert {name: what for name, what in seen.selectors.items() if what} == {}
    assert len(seen.selectors) > 20


def test_what_is_wrong_would_be_seen(seen: Seen) -> None:
    """The control: what the tests above must find, and one expression that is right."""
    found = seen.controls
    assert found["none"] == ""
    assert found["misspelt metric"] == "empty"
    assert found["misspelt label"] == "empty"
    assert "parse error" in found["parse error"]
    assert found["variable"] == "variables without a value: {'instance'}"
    assert found["not a number"] == "empty"
