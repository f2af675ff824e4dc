"""Recording rules and alerts: each alert fires when it should and not else, and says what to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from specinfer.metrics.catalogue import CATALOGUE
from specinfer.metrics.metric import Kind
from specinfer_dashboards.promql import NOT_FAILED
from specinfer_dashboards.runbook import read_entries
from specinfer_dashboards.shared import GOOD_FIRST_TOKEN_SECONDS

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
TESTS = sorted((ROOT / "deploy" / "prometheus" / "tests").glob("*.yml"))
RUNBOOK = ROOT / "docs" / "runbook.md"
PARTS = ("Means", "Impact", "First look")


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it; skip where there is none, fail where CI has none."""
    path = shutil.which("promtool")
    if path is None and os.environ.get("CI"):
        pytest.fail("promtool is not installed, and CI must have it")
    if path is None:
        pytest.skip("promtool is not installed")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=False)


def rules() -> list[dict[str, Any]]:
    files = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in RULES)
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
RECORDS = {rule["record"] for rule in rules() if "record" in rule}


def rule_cases() -> list[dict[str, Any]]:
    files = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in TESTS)
    return [test for file in files for test in file["tests"]]


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    checked = promtool("check", "rules", *map(str, RULES))
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_not_else(path: Path) -> None:
    checked = promtool("test", "rules", str(path))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_promtool_would_see_an_alert_that_never_fires(tmp_path: Path) -> None:
    """The control: the test of memory, against a threshold that nothing reaches."""
    for folder in ("rules", "tests"):
        shutil.copytree(RULES[0].parents[1] / folder, tmp_path / folder)
    alerts = tmp_path / "rules" / "alerts.yml"
    text = alerts.read_text(encoding="utf-8")
    broken = text.replace('{tier="verify"}) > 0.9', '{tier="verify"}) > 1.9')
    assert broken != text
    alerts.write_text(broken, encoding="utf-8")
    checked = promtool("test", "rules", str(tmp_path / "tests" / "memory.yml"))
    assert checked.returncode != 0
    assert "KvNearlyFull" in checked.stdout + checked.stderr


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_is_tested_both_ways(name: str) -> None:
    cases = [
        case
        for test in rule_cases()
        for case in test.get("alert_rule_test", ())
        if case["alertname"] == name
    ]
    assert any(case["exp_alerts"] for case in cases)
    assert any(not case["exp_alerts"] for case in cases)


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_each_recording_rule_is_tested(name: str) -> None:
    asked = " ".join(
        case["expr"] for test in rule_cases() for case in test.get("promql_expr_test", ())
    )
    assert re.search(rf"{name}\b", asked)


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_says_how_bad_it_is_and_what_to_do(name: str) -> None:
    rule = ALERTS[name]
    notes = rule["annotations"]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert notes["summary"]
    assert notes["description"]
    entry = read_entries(RUNBOOK)[name]
    assert notes["runbook_url"] == f"docs/runbook.md#{entry.anchor}"
    for part in PARTS:
        assert f"**{part}.**" in entry.text
    assert re.search(r"\*\*Causes and remed(y|ies)\.\*\*", entry.text)


def test_links_within_the_runbook_lead_somewhere() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    anchors = {entry.anchor for entry in read_entries(RUNBOOK).values()}
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors


def test_rules_ask_for_metrics_that_the_catalogue_has() -> None:
    known = set()
    for metric in CATALOGUE:
        parts = ("_bucket", "_sum", "_count") if metric.kind is Kind.HISTOGRAM else ("",)
        known |= {metric.shown + part for part in parts}
    for rule in rules():
        names = set(re.findall(r"(?<!:)\bspecinfer_\w+", rule["expr"]))
        assert names <= known, rule
        assert set(re.findall(r"model:\w+:\w+", rule["expr"])) <= RECORDS


def test_rules_and_dashboards_agree_on_what_is_good() -> None:
    """A failed stream and a late first token are the same in both."""
    for rule in rules():
        if "stream_failures" in rule.get("record", ""):
            assert f'outcome!~"{"|".join(NOT_FAILED)}"' in rule["expr"]
        if "late_first_tokens" in rule.get("record", ""):
            assert f'le="{GOOD_FIRST_TOKEN_SECONDS:g}"' in rule["expr"]
    buckets = {metric.name: metric.buckets for metric in CATALOGUE}
    assert GOOD_FIRST_TOKEN_SECONDS in buckets["time_to_first_token_seconds"]
