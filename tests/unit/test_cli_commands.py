"""The commands that talk to a cluster, against a scripted router."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from specinfer.errors import ResourceExhausted
from specinfer.messages import ChatMessage, GenerateEvent, GenerateRequest
from specinfer_cli.app import app
from tests.kit.fake_router import (
    FakeRouter,
    capabilities,
    fake_tokens,
    finished_event,
    running,
    started_event,
    tokens_event,
)


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with running(FakeRouter()) as started:
        yield started


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"turns": ["two", "three"]}\n')
    return path


def run(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=text)


def text_of(request: GenerateRequest, count: int = 9) -> str:
    return "".join(f" w{token}" for token in fake_tokens(request, count))


def test_generate_streams_the_answer(router: FakeRouter) -> None:
    result = run("generate", "hello", "--router", router.address, "--system", "short")
    assert result.exit_code == 0, result.output
    request = router.requests[0]
    assert request.messages == (ChatMessage("system", "short"), ChatMessage("user", "hello"))
    assert request.sampling.greedy
    assert result.stdout == text_of(request) + "\n"
    assert result.stderr == ""


def test_generate_raw_from_stdin_with_all_options(router: FakeRouter) -> None:
    options = "--raw --max-tokens 4 --temperature 0.7 --top-k 9 --top-p 0.9 --min-p 0.1 --seed 3"
    shape = "--stop END --max-nodes 5 --max-depth 2"
    result = run(
        *["generate", "-", "--router", router.address, *options.split(), *shape.split()],
        text="def f():\n",
    )
    assert result.exit_code == 0, result.output
    request = router.requests[0]
    assert (request.prompt, request.messages) == ("def f():\n", None)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 9, 0.9)
    assert (sampling.min_p, sampling.seed, request.random_seed) == (0.1, 3, False)
    assert (request.stop.max_tokens, request.stop.stop) == (4, ("END",))
    assert (request.speculation.max_nodes, request.speculation.max_depth) == (5, 2)


def test_generate_without_a_chat_template_is_raw(router: FakeRouter) -> None:
    router.capabilities = capabilities(chat=False)
    assert run("generate", "hello", "--router", router.address).exit_code == 0
    assert router.requests[0].prompt == "hello"
    refused = run("generate", "hello", "--router", router.address, "--system", "short")
    assert refused.exit_code == 2
    assert "chat template" in refused.stderr


def test_generate_json_and_stats(router: FakeRouter) -> None:
    result = run(
        *["generate", "hello", "--router", router.address, "--json", "--stats"],
        *["--no-speculation", "--seed", "5", "--temperature", "1"],
    )
    answer = json.loads(result.stdout)
    request = router.requests[0]
    assert not request.speculation.enabled
    assert answer["text"] == text_of(request)
    assert answer["token_ids"] == fake_tokens(request, 9)
    assert (answer["seed"], answer["finish_reason"], answer["model"]) == (5, "length", "fake")
    assert answer["usage"]["num_cached_tokens"] == 2
    assert answer["statistics"]["num_rounds"] == 9
    assert answer["statistics"]["verify_seconds"] == pytest.approx(0.018)
    assert "9 rounds, 1.00 tokens a round" in result.stderr
    assert "seed 5" in result.stderr


def test_bad_arguments_exit_with_2(router: FakeRouter) -> None:
    for arguments, reason in (
        (["generate", ""], "prompt is empty"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--max-tokens", "0"], "max_tokens"),
        (["lossless", "--prompts", "/nowhere.jsonl"], "cannot read"),
        (["lossless", "--all-paths", "--router", "127.0.0.1:1"], "clusters, without --router"),
        (["lossless", "--dtype", "int8"], "float32, bfloat16, float64"),
    ):
        result = run(*arguments, "--router", router.address)
        assert result.exit_code == 2, result.output
        assert reason in result.stderr
        assert "Traceback" not in result.output
    refused = run("up", "--kv-dtype", "int8")
    assert refused.exit_code == 2
    assert "auto, fp8" in refused.stderr
    assert router.requests == []


def test_no_cluster_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("SPECINFER_ROUTER", f"127.0.0.1:{probe.getsockname()[1]}")
        result = run("generate", "hello")
    assert result.exit_code == 1
    assert "specinfer up" in result.stderr


def test_errors_name_the_request(router: FakeRouter) -> None:
    async def refuse(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        yield started_event(request)
        raise ResourceExhausted("full")

    router.script = refuse
    result = run("generate", "hello", "--router", router.address)
    assert result.exit_code == 1
    assert "error: full" in result.stderr
    assert f"request id: {router.requests[0].request_id}" in result.stderr


def lossless(router: FakeRouter, prompts: Path, *more: str) -> Result:
    return run(
        *["lossless", "--router", router.address, "--prompts", str(prompts)],
        *["--samples", "2", "--max-tokens", "8", *more],
    )


def test_lossless_counts_equal_runs(router: FakeRouter, prompts: Path) -> None:
    result = lossless(router, prompts, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    # Two greedy settings once and six sampled ones twice, for two prompts.
    assert report["num_cases"] == 2 * (2 + 2 * 6)
    assert report["num_comparisons"] == 3 * report["num_cases"]
    assert report["num_tokens"] == 8 * report["num_comparisons"]
    assert report["lossless"] is True
    assert (report["num_divergences"], report["num_errors"]) == (0, 0)
    assert len(router.requests) == 4 * report["num_cases"]
    assert {r.messages for r in router.requests} == {
        (ChatMessage("user", text),) for text in ("one", "two")
    }
    plain = [r for r in router.requests if not r.speculation.enabled]
    assert len(plain) == report["num_cases"]
    sampled = {(r.sampling.seed, r.messages) for r in plain if not r.sampling.greedy}
    assert len(sampled) == 4
    assert any(r.sampling.penalised for r in plain)


def test_lossless_prints_counts(router: FakeRouter, prompts: Path) -> None:
    result = lossless(router, prompts, "--num-prompts", "1", "--raw")
    assert result.exit_code == 0, result.output
    assert "1 prompts, 8 settings, 3 tree shapes" in result.stdout
    assert "14 cases, 42 comparisons, 336 tokens" in result.stdout
    assert "lossless: the same tokens" in result.stdout
    assert {request.prompt for request in router.requests} == {"one"}


def test_lossless_reports_a_divergence(router: FakeRouter, prompts: Path) -> None:
    async def wrong(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        token_ids = fake_tokens(request, 8)
        bad = request.speculation.widths and request.sampling.top_k == 20
        if bad and request.sampling.seed == 3:
            token_ids[5] += 1
        yield started_event(request)
        yield tokens_event(request, 0, token_ids)
        yield finished_event(8, 1)

    router.script = wrong
    result = lossless(router, prompts, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["lossless"] is False
    assert report["num_divergences"] == 2
    for divergence in report["divergences"]:
        plain, speculated = divergence["token_ids"]
        assert speculated == plain + 1
        assert (divergence["prompt"], divergence["seed"]) == (1, 3)
        assert (divergence["position"], divergence["setting"]) == (5, "top-k 20")
        assert divergence["reproduced"] is True
        # The fake gives a token -0.5 and the token after it -1.5.
        assert divergence["plain_logprobs"] == [-0.5, -1.5]
        assert divergence["speculated_logprobs"] == [None, -0.5]
    told = lossless(router, prompts).stdout
    assert "differs at token 5" in told
    assert "NOT lossless" in told


def test_lossless_reports_a_shorter_run(router: FakeRouter, prompts: Path) -> None:
    async def cut(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        count = 7 if request.speculation.enabled else 8
        yield started_event(request)
        yield tokens_event(request, 0, fake_tokens(request, 8)[:count])
        yield finished_event(count, 1)

    router.script = cut
    report = json.loads(lossless(router, prompts, "--json").stdout)
    assert report["num_divergences"] == report["num_comparisons"]
    assert len(report["divergences"]) == 84
    assert report["divergences"][0]["position"] == 7
    assert report["divergences"][0]["token_ids"][1] is None


def test_lossless_fails_when_nothing_was_put_to_the_test(router: FakeRouter, prompts: Path) -> None:
    async def plain(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        yield started_event(request)
        yield tokens_event(request, 0, [1])
        yield finished_event(1, 1)

    router.script = plain
    result = lossless(router, prompts)
    assert result.exit_code == 1
    assert "nothing was tested" in result.stdout


def test_lossless_counts_failed_calls(router: FakeRouter, prompts: Path) -> None:
    async def full(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        yield started_event(request)
        raise ResourceExhausted("full")

    router.script = full
    report = json.loads(lossless(router, prompts, "--json").stdout)
    assert report["lossless"] is False
    assert report["num_errors"] == report["num_cases"] == 28
    assert report["errors"][0].endswith("RESOURCE_EXHAUSTED: full")


def test_bench_times_a_given_router(router: FakeRouter, prompts: Path) -> None:
    options = "--num-prompts 2 --max-tokens 6 --temperature 0.8 --repeats 2 --seed 5"
    command = ["bench", "--router", router.address, "--prompts", str(prompts), *options.split()]
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["identical"] is True
    assert report["speedup_min"] <= report["speedup"] <= report["speedup_max"]
    assert (report["num_prompts"], report["num_tokens"]) == (2, 12)
    assert report["arms"]["on"]["tokens_per_round"] == 3.0
    assert report["arms"]["off"]["tokens_per_round"] == 1.0
    assert {request.sampling.temperature for request in router.requests} == {0.8}
    assert {request.sampling.seed for request in router.requests} == {5, 6}
    told = run(*command)
    assert "outputs identical: yes" in told.stdout


def test_bench_tells_what_it_measured_and_keeps_it(
    router: FakeRouter, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "results" / "first.json"
    router.capabilities = dataclasses.replace(capabilities(), dtype="float64")
    command = [
        *["bench", "--router", router.address, f"--prompts={prompts}", "--dtype", "float32"],
        *["--num-prompts", "1", "--max-tokens", "6", "--output", str(kept), "--json"],
    ]
    monkeypatch.setattr("sys.argv", [str(tmp_path / "bin" / "specinfer"), *command])
    result = run(*command)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert json.loads(kept.read_text(encoding="utf-8")) == report
    setup = report["setup"]
    assert set(setup) == {"command", "options", "machine", "model", "model_hash", "dtype"}
    served = router.capabilities
    assert (setup["model"], setup["model_hash"]) == (served.model, served.model_hash)
    # The router's own, whatever the option says.
    assert (setup["dtype"], setup["options"]["dtype"]) == ("float64", "float32")
    assert setup["machine"]["cores"] > 0
    assert setup["command"][:2] == ["specinfer", "bench"]
    assert "--prompts=prompts.jsonl" in setup["command"]
    assert str(tmp_path) not in json.dumps(setup)
    unwritable = ["--output", str(prompts / "x.json")]
    assert run(*command[:-3], *unwritable).exit_code == 2


def test_bench_fails_when_outputs_differ(router: FakeRouter, prompts: Path) -> None:
    async def wrong(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        yield started_event(request)
        yield tokens_event(request, 0, [1 + request.speculation.enabled])
        yield finished_event(1, 1)

    router.script = wrong
    command = ["bench", "--router", router.address, "--prompts", str(prompts), "--repeats", "1"]
    result = run(*command, "--num-prompts", "1")
    assert result.exit_code == 1
    assert "outputs identical: NO" in result.stdout


def test_bench_refuses_what_cannot_be(router: FakeRouter) -> None:
    for arguments, reason in ((["--grow", "70b"], "200m"), (["--repeats", "0"], "repeats")):
        result = run("bench", *arguments)
        assert result.exit_code == 2
        assert reason in result.stderr
    assert run("bench", "--grow", "1b", "--router", router.address).exit_code == 2
    assert router.requests == []
