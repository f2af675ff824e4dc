"""The comparison's plumbing and arithmetic, with engines that are made up."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specinfer.errors import Unavailable
from specinfer_bench.load.cluster import DEMO
from specinfer_bench.peers.__main__ import (
    bench_parser,
    load_peers,
    make_pair,
    make_tasks,
    run_comparison,
)
from specinfer_bench.peers.interleave import WARM_UP_TOKENS, Outcome, joined, run_all
from specinfer_bench.peers.llama_cpp import (
    LlamaCpp,
    _run_tree,
    read_answer,
    read_tree_report,
    running_driver,
)
from specinfer_bench.peers.others import Vllm
from specinfer_bench.peers.peer import Answer, Arm, Pair, Task
from specinfer_bench.peers.report import build_report, first_differences
from specinfer_bench.peers.table import peers_table

EOS = 4
TASK = Task("hi", (1, 2), max_tokens=16, temperature=0.0, seed=3)
PAIR = Pair(Path("t"), Path("d"), "float32", 1, frozenset({EOS}), Path("cache"))


class FakePeer:
    """An engine whose only arm answers at once."""

    def __init__(self, name: str, reason: str | None = None, failure: Exception | None = None):
        self.name = name
        self.reason = reason
        self.failure = failure
        self.closed = False

    def missing(self) -> str | None:
        return self.reason

    @contextmanager
    def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
        if self.failure is not None:
            raise self.failure
        yield {self.name: Arm(lambda task: answer(7))}
        self.closed = True


def answer(*token_ids: int, seconds: float = 1.0) -> Answer:
    return Answer(len(token_ids), seconds, token_ids, seconds / 2)


def test_engines_that_are_missing_or_do_not_load_are_skipped_with_their_reason() -> None:
    here, gone = FakePeer("here"), FakePeer("gone", reason="not installed")
    broken = FakePeer("broken", failure=RuntimeError("no such model"))
    with ExitStack() as stack:
        arms, skipped = load_peers([here, gone, broken], PAIR, stack)
        assert list(arms) == ["here"]
        assert not here.closed
    assert here.closed
    assert skipped == {"broken": "RuntimeError: no such model", "gone": "not installed"}


def test_every_turn_of_an_arm_begins_with_a_short_request_and_tasks_go_back_and_forth() -> None:
    seen: list[tuple[str, str, int]] = []

    def arm(name: str) -> Arm:
        def run(task: Task) -> Answer:
            seen.append((name, task.text, task.max_tokens))
            return answer(5)

        return Arm(run)

    arms, warm_up = {"a": arm("a"), "b": arm("b")}, replace(TASK, text="warm up")
    second = replace(TASK, text="ho")
    outcome = run_all(arms, warm_up, [TASK, second], repeats=2)

    def turn(name: str, text: str) -> list[tuple[str, str, int]]:
        return [(name, "warm up", WARM_UP_TOKENS), (name, text, 16)]

    once = [*turn("a", "hi"), *turn("b", "hi"), *turn("b", "ho"), *turn("a", "ho")]
    assert seen == [*once, *once]
    assert [[len(repeat) for repeat in one] for one in outcome.answers.values()] == [[2, 2]] * 2


def test_no_task_begins_that_would_take_longer_than_the_time_left() -> None:
    now, runs = 0.0, 0

    def run(task: Task) -> Answer:
        nonlocal now, runs
        if task.text != "warm up":
            now, runs = now + 10.0, runs + 1
        return answer(5)

    warm_up = replace(TASK, text="warm up")
    for seconds, shape in ((1.0, [1]), (29.0, [2]), (30.0, [2, 1]), (99.0, [2, 2, 2])):
        outcome = run_all(
            {"a": Arm(run)}, warm_up, [TASK] * 2, 3, max_seconds=seconds, clock=lambda: now
        )
        assert [len(repeat) for repeat in outcome.answers["a"]] == shape
    assert runs == 12


def test_an_arm_that_fails_halfway_is_dropped_and_the_others_go_on() -> None:
    runs = 0

    def run(task: Task) -> Answer:
        nonlocal runs
        runs += 1
        if runs == 3:
            raise Unavailable("the process has ended")
        return answer(5)

    arms = {"good": Arm(lambda task: answer(5)), "bad": Arm(run)}
    outcome = run_all(arms, TASK, [TASK, TASK], repeats=2)
    assert list(outcome.answers) == ["good"]
    assert outcome.failed == {"bad": "Unavailable: the process has ended"}
    assert runs == 3


def test_an_arm_that_fails_after_one_load_is_left_out_of_all() -> None:
    former = Outcome({"good": [[answer(5)]], "bad": [[answer(5)]], "gone": [[answer(5)]]}, {})
    later = Outcome({"good": [[answer(6)]], "new": [[answer(6)]]}, {"bad": "it broke"})
    assert joined(None, former) == former
    both = joined(former, later)
    assert both == Outcome({"good": [[answer(5)], [answer(6)]]}, {"bad": "it broke"})


def test_plain_decoding_is_compared_over_several_loads_there_and_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    loaded: list[str] = []

    class Engine(FakePeer):
        @contextmanager
        def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
            loaded.append(self.name)
            seconds = len(loaded) / 2
            yield {
                self.name: Arm(lambda task: answer(5, seconds=seconds), plain=True),
                f"{self.name}, guessing": Arm(lambda task: answer(5)),
            }

    words = ["--model", str(DEMO / "target"), "--num-prompts", "1", "--repeats", "1"]
    words += ["--loads", "3", "--temperatures", "0", "--output", str(tmp_path / "plain.json")]
    arguments = bench_parser("peers", "What it does.").parse_args(words)
    run_comparison("peers", [Engine("ours"), Engine("other")], arguments, "ours", "ours")
    # The last to be loaded may find less memory in one piece, so that is each one in turn.
    assert loaded == ["other", "ours", "ours", "other", "other", "ours"]
    table = capsys.readouterr().out
    assert "each engine loaded 3 times" in table
    assert "| arm | tokens/s | first token, ms | over ours | same output |" in table
    assert "guessing" not in table
    report = json.loads((tmp_path / "plain.json").read_text())["reports"][0]
    # Seconds 1, 1.5 and 3 of ours beside 0.5, 2 and 2.5 of the other one.
    assert report["arms"]["other"]["over_plain"]["median"] == pytest.approx(1.2)
    assert report["num_repeats"] == 3


@pytest.mark.parametrize(
    "option", ["--num-prompts", "--max-tokens", "--repeats", "--loads", "--max-seconds"]
)
@pytest.mark.parametrize("number", ["0", "-1", "1.5", "few"])
def test_numbers_below_one_are_refused(
    option: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench_parser("peers", "What it does.").parse_args([f"{option}={number}"])
    assert f"at least 1, not '{number}'" in capsys.readouterr().err


def test_an_engine_that_one_load_does_without_is_skipped_with_its_reason(tmp_path: Path) -> None:
    late = FakePeer("late", failure=RuntimeError("not yet"))

    class Ours(FakePeer):
        @contextmanager
        def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
            yield {self.name: Arm(lambda task: answer(5), plain=True)}
            late.failure = None

    words = ["--model", str(DEMO / "target"), "--num-prompts", "1", "--repeats", "1"]
    words += ["--loads", "2", "--temperatures", "0", "--output", str(tmp_path / "plain.json")]
    arguments = bench_parser("peers", "What it does.").parse_args(words)
    run_comparison("peers", [Ours("ours"), late], arguments, "ours", "ours")
    result = json.loads((tmp_path / "plain.json").read_text())
    assert result["skipped"] == {"late": "RuntimeError: not yet"}
    assert list(result["reports"][0]["arms"]) == ["ours"]


def test_outputs_are_compared_to_the_first_other_token_and_end_tokens_do_not_count() -> None:
    reference = [[answer(7, 8, 9, EOS), answer(7, 8)]]
    eos = frozenset({EOS})
    assert first_differences(reference, [[answer(7, 8, 9), answer(7, 8)]], eos) == {}
    assert first_differences(reference, [[answer(7, 0, 9), answer(7, 8)]], eos) == {0: 1}
    # One that stops too early, and one that goes on.
    assert first_differences(reference, [[answer(7, 8), answer(7, 8, 9)]], eos) == {0: 2, 1: 2}
    assert first_differences(reference, [[Answer(3, 1.0), Answer(2, 1.0)]], eos) is None


def report_of(temperature: float) -> Mapping[str, object]:
    arms = {
        "plain": Arm(lambda task: answer(5), plain=True, seeded=True),
        "ours": Arm(lambda task: answer(5), seeded=True),
        "other": Arm(lambda task: answer(5)),
    }
    outcome = Outcome(
        {
            "plain": [[answer(7, 8, seconds=2.0), answer(9, 9, seconds=4.0)]],
            "ours": [[answer(7, 8, seconds=0.5), answer(9, 9, seconds=1.0)]],
            "other": [[answer(7, 8, seconds=1.0), answer(9, 6, seconds=2.0)]],
        },
        {"gone": "Unavailable: ended"},
    )
    return build_report(
        outcome,
        arms,
        temperature=temperature,
        eos_token_ids=frozenset({EOS}),
        baseline="plain",
        ours="ours",
    ).as_dict()


def test_ratios_are_of_runs_side_by_side() -> None:
    report = report_of(0.0)
    arms = report["arms"]
    assert isinstance(arms, dict)
    assert arms["ours"]["over_plain"]["median"] == pytest.approx(4.0)
    assert arms["other"]["over_plain"]["median"] == pytest.approx(2.0)
    assert arms["other"]["ours_over_it"]["median"] == pytest.approx(2.0)
    assert arms["plain"]["tokens_per_second"] == pytest.approx(4 / 6, rel=1e-3)
    assert arms["ours"]["first_token_ms"] == pytest.approx(375.0)
    assert (arms["other"]["num_same"], arms["other"]["first_differences"]) == (1, {1: 1})


def test_a_load_that_had_time_for_fewer_tasks_takes_none_from_the_next() -> None:
    same, other = answer(5), Answer(1, 1.0, (9,))
    outcome = Outcome({"plain": [[same], [same, same]], "ours": [[other], [other, other]]}, {})
    arms = {name: Arm(lambda task: same) for name in outcome.answers}
    report = build_report(
        outcome, arms, temperature=0, eos_token_ids=frozenset(), baseline="plain", ours="ours"
    )
    assert (report.num_tasks, report.num_repeats) == (2, 2)
    assert (report.arms["plain"].num_same, report.arms["ours"].num_same) == (2, 0)


def test_what_draws_otherwise_is_not_compared_above_temperature_zero() -> None:
    arms = report_of(0.8)["arms"]
    assert isinstance(arms, dict)
    assert arms["other"]["num_same"] is None
    assert arms["ours"]["num_same"] == 2


def test_there_is_no_report_without_our_own_arms() -> None:
    with pytest.raises(ValueError, match="ours failed: it broke"):
        build_report(
            Outcome({"plain": [[answer(5)]]}, {"ours": "it broke"}),
            {},
            temperature=0.0,
            eos_token_ids=frozenset(),
            baseline="plain",
            ours="ours",
        )


def test_the_table_names_every_arm_and_every_reason() -> None:
    setup = {"model": "demo grown to 1b", "dtype": "bfloat16"}
    result: dict[str, Any] = {
        "reports": [report_of(0.0), report_of(0.8)],
        "skipped": {"vLLM": "not\nthere"},
        "setup": setup,
    }
    result["reports"][0]["arms"]["other"]["over_plain"]["high"] = 2.5
    table = peers_table(result)
    assert "| ours | 2.7 | 375 | 4.00 |  | 2 of 2 |" in table, "what has no spread shows none"
    assert "| other | 1.3 | 750 | 2.00 (2.00 to 2.50) | 2.00 | 1 of 2" in table
    assert "from token 1 on" in table
    bullet = "* gone: failed: Unavailable: ended\n"
    assert f"{bullet}\n**demo grown to 1b, bfloat16, temperature 0.8**\n" in table
    assert table.endswith(f"{bullet}\n* vLLM: skipped: not there\n")
    for report in result["reports"]:
        report["failed"] = {}
    assert "\n\n\n" not in peers_table(result), "who has no bullets needs no line after them"


def test_a_driver_answers_lines_and_its_end_is_an_error() -> None:
    script = 'echo ready; read x; echo "ok 0.25 0.5 2 7 8"; read x; echo "error no room"; read x'
    with running_driver(["sh", "-c", script]) as driver:
        assert driver.run("plain", 0, TASK) == Answer(2, 0.5, (7, 8), 0.25)
        with pytest.raises(Unavailable, match="no room"):
            driver.run("chain", 8, TASK)
    with (
        pytest.raises(Unavailable, match="no such model"),
        running_driver(["sh", "-c", "echo no such model"]),
    ):
        pass


@pytest.mark.parametrize("line", ["", "ok", "ok 0.1 0.2 3 1 2", "error broken"])
def test_a_line_that_is_no_answer_is_refused(line: str) -> None:
    with pytest.raises(Unavailable):
        read_answer(line)


def tree_program(tmp_path: Path, num_failures: int) -> Path:
    """A program that ends early so often, and then prints what llama-speculative does."""
    program, tries = tmp_path / "program", tmp_path / "tries"
    program.write_text(
        f"#!/bin/sh\necho >> {tries}\n"
        f"[ $(wc -l < {tries}) -gt {num_failures} ] || {{ echo in the middle; exit 3; }}\n"
        "echo encoded 2 tokens in 0.5 seconds; echo decoded 12 tokens in 1.5 seconds\n"
    )
    program.chmod(0o755)
    return program


def test_llama_cpps_tree_gets_a_second_try(tmp_path: Path) -> None:
    assert _run_tree([str(tree_program(tmp_path, 1))], TASK) == Answer(12, 2.0)


def test_llama_cpps_tree_gets_no_third_try(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="ended with 3 twice, last with: in the middle"):
        _run_tree([str(tree_program(tmp_path, 2))], TASK)


def test_what_llama_cpp_prints_of_a_tree_is_read_and_checked() -> None:
    text = (
        "0.1 I encoded    2 tokens in    0.5 seconds, speed\nI decoded   12 tokens in 1.5 seconds"
    )
    assert read_tree_report(text, TASK) == Answer(12, 2.0)
    with pytest.raises(Unavailable, match="3 tokens, not 2"):
        read_tree_report(text.replace("encoded    2", "encoded    3"), TASK)
    with pytest.raises(Unavailable, match="invalid argument"):
        read_tree_report("error: invalid argument", TASK)


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "build_llama_cpp" in (LlamaCpp().missing() or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Vllm().missing() == "the package vllm is not installed"


def test_tasks_are_the_demo_questions_through_the_chat_template() -> None:
    demo = DEMO
    arguments: argparse.Namespace = bench_parser("peers", "What it does.").parse_args(
        ["--model", str(demo / "target"), "--num-prompts", "2", "--seed", "5"]
    )
    pair = make_pair(arguments)
    first, second, warm_up = make_tasks(arguments, pair, 0.8)
    assert warm_up.text not in (first.text, second.text)
    assert first.text.startswith("<|bos|><|user|>")
    assert first.text.endswith("<|assistant|>")
    assert first.token_ids[0] == 1
    assert (first.seed, second.seed, first.temperature) == (5, 6, 0.8)
    assert pair.eos_token_ids == {EOS}
