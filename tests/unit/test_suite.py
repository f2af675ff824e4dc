"""The pages of `make bench` say what its files say."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from specinfer.errors import InvalidRequest
from specinfer_bench.load.agreement import SERIES, Agreement
from specinfer_bench.load.arrivals import Arrival
from specinfer_bench.load.asking import BY_COST, OFF
from specinfer_bench.load.observation import DONE as REQUEST_DONE
from specinfer_bench.load.observation import Observation
from specinfer_bench.load.open_loop import Clock
from specinfer_bench.load.rates import RatesOptions, run_rates
from specinfer_bench.load.summary import Objective, summary
from specinfer_bench.load.sweep import ARMS, SweepOptions, run_sweep
from specinfer_bench.machine import commit_of
from specinfer_bench.report import ArmReport, BenchReport
from specinfer_bench.suite.page import PICTURES, SECTIONS, filled
from specinfer_bench.suite.pictures import SWEEP, stale
from specinfer_bench.suite.plots import draw_all
from specinfer_bench.suite.results import Results, write_summary
from specinfer_bench.suite.running import (
    DONE,
    FAILED,
    PartResult,
)
from specinfer_bench.suite.tables import grown_to
from tests.kit.virtual_time import run_in_virtual_time

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"processor": "a processor", "cores": 2}


def test_a_report_by_itself_says_what_its_target_was_grown_to() -> None:
    assert grown_to({"setup": {"options": {"grow": "1b"}}}) == "1b"
    assert grown_to({"setup": {"options": {"grow": None}, "grow": "200m"}}) == "200m"
    assert grown_to({"setup": {"options": {"grow": None}}}) == "demo"


def speed_report(speedup: float) -> dict[str, object]:
    arm = ArmReport(40.0, 25.0, 4.0, {})
    options = {"grow": None, "temperature": 0.8}
    setup = {"machine": MACHINE, "options": options, "grow": "200m"}
    arms = {"off": arm, "on": replace(arm, tokens_per_second=40.0 * speedup)}
    report = BenchReport(speedup, speedup, speedup, True, (), 3.0, None, arms, 2, 64, setup)
    return report.as_dict()


async def ask(arrival: Arrival, seen: Observation, clock: Clock) -> None:
    await asyncio.sleep(0.01 * arrival.max_tokens)
    seen.events.append((clock(), arrival.max_tokens))


def sweep_document() -> dict[str, object]:
    options = SweepOptions(sessions=(1, 8), max_tokens=10, repeats=1)
    report = run_in_virtual_time(run_sweep(dict.fromkeys(ARMS, ask), ["a"], options))
    return {**asdict(report), "setup": {"machine": MACHINE}}


def rates_document() -> dict[str, object]:
    objective = Objective(0.5, 0.1)
    options = RatesOptions(rates=(1.0, 2.0), seconds=4.0, max_tokens=10)
    cells = run_in_virtual_time(run_rates(dict.fromkeys(ARMS, ask), ["a"], options, objective))
    return {"objective": asdict(objective), "cells": [asdict(cell) for cell in cells]}


def open_document(speculation: str) -> dict[str, object]:
    objective = Objective(0.5, 0.1)
    seen = [Observation(0.0, 0.0, [(0.3, 2), (0.7, 8)], ended=0.7, outcome=REQUEST_DONE)]
    row = {"scheduled": 0.0, "first_token": 0.3, "ended": 0.7, "outcome": REQUEST_DONE}
    return {
        "objective": asdict(objective),
        "speculation": speculation,
        "offered_per_second": 1.0,
        "summary": asdict(summary(seen, objective)),
        "empty_call_ms": 2.25,
        "prometheus": {
            name: asdict(Agreement(3.0, 3.0, 3.0, 0.0, 0.5, True, True)) for name in SERIES
        },
        "requests": [row],
        "setup": {"machine": MACHINE},
    }


def router_document() -> dict[str, object]:
    spent = {"median": 0.19, "low": 0.1, "high": 0.2}
    crowd = {"load": {"sessions": 64, "tokens": 256}, "router_ms_of_a_round": spent}
    lost = {"median": 0.06, "low": 0.05, "high": 0.07}
    alone = {**crowd, "load": {"sessions": 1, "tokens": 256}, "loss": lost}
    loads = {
        "crowd": {**crowd, "rounds_per_second": 4000.0},
        "alone": {**alone, "rounds_per_second": 17.0, "loop_rounds_per_second": 17.8},
    }
    return {"goal_ms": 0.2, "goal_loss": 0.05, "loads": loads}


def write_results(folder: Path, speedup: float = 4.5) -> None:
    documents = {
        "speed-200m-t0.8": speed_report(speedup),
        "load-sweep": sweep_document(),
        "load-rates": rates_document(),
        "load-open-off": open_document(OFF),
        "load-open-by-cost": open_document(BY_COST),
        "peers-200m": {"reports": [], "skipped": {"vllm": "not installed"}, "setup": {}},
        "router-cost": router_document(),
        "kernels-kv-cache": {"lines": ["8 rows   0.1 ms"], "setup": {}},
    }
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    done = PartResult("", "", DONE, seconds=9.0, commit="abc1234, changed")
    found = {name: replace(done, title=name, command=f"run {name}") for name in documents}
    found["overlap"] = PartResult("overlap", "run overlap", FAILED, "exit status 1: a | b")
    write_summary(folder, found, order=list(found))


EMPTY = "Mine.\n" + "".join(
    f"<!-- {name}: begin -->\n<!-- {name}: end -->\nMore.\n" for name in SECTIONS
)


def test_a_page_says_what_the_files_say(tmp_path: Path) -> None:
    write_results(tmp_path)
    page = filled(EMPTY, Results.read(tmp_path))
    for said in (
        "| 200m | 0.8 | **4.50** | 40.0 | 180.0 |",
        "| 8 | 1 | 800.0 | 800.0 | 800.0 | 1.00 | **1.00** | 10.00 | yes |",
        "(goal 0.97: met)",
        "(goal 1.5: not met)",
        "| 300 | 300 | 300 |",
        "skipped: not installed",
        "| crowd | 256 | **0.190** (0.100 to 0.200) | 0.2 ms: met | 4000 |  |  |  |",
        "| 17 | 17.8 | **6.0%** (5.0% to 7.0%) | 5%: not met |",
        "8 rows   0.1 ms",
        "A call that generates nothing took 2.2 and 2.2 ms after these runs.",
        "*overlap: failed, exit status 1: a / b.*",
        "Other work kept at most 0.0 of the machine's cores busy just before each part.",
        "| router-cost | `run router-cost` | done | 9 | 0.0 | abc1234, changed |",
    ):
        assert said in page, said
    assert page.count("More.") == len(SECTIONS)
    assert filled(page, Results.read(tmp_path)) == page


def test_a_page_of_other_numbers_is_noticed(tmp_path: Path) -> None:
    write_results(tmp_path)
    page = filled(EMPTY, Results.read(tmp_path))
    write_results(tmp_path, speedup=4.6)
    assert filled(page, Results.read(tmp_path)) != page


def test_without_results_a_page_says_so(tmp_path: Path) -> None:
    assert filled(EMPTY, Results.read(tmp_path)).count("Not measured yet") == len(SECTIONS)


@pytest.mark.parametrize("text", ["<!-- nothing: begin -->", "<!-- speed: begin -->"])
def test_marks_without_a_section_or_an_end_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="section"):
        filled(text, Results())


def test_a_part_run_again_takes_its_own_place(tmp_path: Path) -> None:
    order = ["a", "b"]
    old = PartResult("", "", FAILED, "old")
    write_summary(tmp_path, {"a": old, "b": old, "gone": old}, order)
    write_summary(tmp_path, {"a": replace(old, reason="new")}, order)
    found = Results.read(tmp_path).parts
    assert {name: each.reason for name, each in found.items()} == {"a": "new", "b": "old"}
    assert list(found) == order


def test_pictures_carry_their_numbers_and_old_ones_are_noticed(tmp_path: Path) -> None:
    write_results(tmp_path)
    pictures = tmp_path / "pictures"
    draw_all(Results.read(tmp_path), pictures)
    assert stale(Results.read(tmp_path), pictures) == []
    drawn = (pictures / SWEEP).read_text()
    assert "sessions at once" in drawn
    assert "chosen by cost" in drawn
    draw_all(Results.read(tmp_path), pictures)
    assert (pictures / SWEEP).read_text() == drawn
    (tmp_path / "load-sweep.json").write_text(json.dumps({**sweep_document(), "note": 1}))
    assert stale(Results.read(tmp_path), pictures) == [SWEEP]


@pytest.mark.parametrize(
    ("name", "pictures"), [("docs/performance.md", PICTURES), ("README.md", f"docs/{PICTURES}")]
)
def test_our_pages_are_those_of_our_files(name: str, pictures: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    results = Results.read(ROOT / "bench" / "results" / "suite")
    assert filled(text, results, pictures) == text
    assert stale(results, ROOT / "docs" / PICTURES) == []


def test_a_commit_says_whether_its_code_was_changed(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == ""
    code, result = tmp_path / "code.py", tmp_path / "bench" / "results" / "a.json"
    result.parent.mkdir(parents=True)
    for file in (code, result):
        file.write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    result.write_text("2")
    commit = commit_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{4,}", commit)
    code.write_text("2")
    assert commit_of(tmp_path) == f"{commit}, changed"
