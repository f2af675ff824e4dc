"""One trace from the SDK to Redis, as a real collector receives it; and no text in it or in logs.

A cluster of processes with a real Redis, at the level "debug", in which each part of what users
send and get has a marker in it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from specinfer import AsyncClient, Completion
from specinfer.errors import SpecinferError
from specinfer.messages import Grammar, SpeculationOptions
from specinfer.options import GenerateOptions
from specinfer_bench.traces.cluster import Models, traced_application, traced_cluster
from specinfer_bench.traces.collector import ReceivedSpan, children_of, roots_of

pytestmark = pytest.mark.timeout(300)

MARKER = "xylophone"
TURN = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SHAPE = SpeculationOptions(max_nodes=3, max_depth=3)
TOKENS = 12

WORK = ["queue INTERNAL", "passes INTERNAL"]
COMMIT = ["commit INTERNAL", ["redis commit CLIENT"]]
FIRST_ROUND = [
    "propose CLIENT",
    ["draft open SERVER", "draft propose SERVER", WORK],
    "verify CLIENT",
    ["verify open SERVER", "verify step SERVER", WORK],
    *COMMIT,
]
LATER_ROUND = [
    "propose CLIENT",
    ["draft propose SERVER", WORK],
    "verify CLIENT",
    ["verify step SERVER", WORK],
    *COMMIT,
]
# No guess could be used: the text ends with this token.
LAST_ROUND = ["propose CLIENT", "verify CLIENT", ["verify step SERVER", WORK], *COMMIT]
BEFORE = ["queue INTERNAL", "tokenize INTERNAL", "redis create CLIENT"]


@dataclass(frozen=True)
class Seen:
    """What came of all the requests.

    Attributes:
        sdk: the chat request of the SDK.
        http: the body of the chat request over HTTP.
        outputs: what was generated with the marker in it.
        spans: all that the collector received.
        logs: all that the processes wrote.
    """

    sdk: Completion
    http: Any
    outputs: Sequence[str]
    spans: Sequence[ReceivedSpan]
    logs: bytes

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        return [span for span in self.spans if span.trace_id == trace_id]

    def sdk_trace(self) -> list[ReceivedSpan]:
        return self.trace(
            next(
                s.trace_id
                for s in self.spans
                if s.attributes.get("gen_ai.request.model") == "target"
            )
        )


@pytest.fixture(scope="module")
def seen(tiny_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opentelemetry.trace._TRACER_PROVIDER", None)
        patch.setattr("opentelemetry.trace._TRACER_PROVIDER_SET_ONCE._done", False)
        found = asyncio.run(run_all(Models(*tiny_pair), folder))
    logs = b"".join(path.read_bytes() for path in sorted(folder.glob("*.log")))
    return dataclasses.replace(found, logs=logs)


async def run_all(models: Models, folder: Path) -> Seen:
    async with (
        traced_cluster(
            models,
            flags=("--log-level", "debug"),
            # However busy the machine is, each round has a tree and waits for it.
            router_flags=("--policy", "static", "--propose-deadline", "60"),
            logs=folder,
        ) as running,
        AsyncClient(running.router) as client,
        httpx.AsyncClient(base_url=f"http://{running.gateway}", timeout=60) as http,
    ):
        async with traced_application(running.collector):
            reply = await client.generate(
                messages=[{"role": "user", "content": f"what is a {MARKER}?"}],
                model="target",
                request_id="request-1",
                max_tokens=TOKENS,
                temperature=0,
                speculation=SHAPE,
                detail=True,
            )
        answer = await http.post(
            "/v1/chat/completions",
            headers={
                "traceparent": f"00-{TURN}-{PARENT}-01",
                "tracestate": "specinfer=rounds",
                "x-request-id": "request-2",
            },
            json=chat_body(max_tokens=TOKENS, temperature=0, n=1),
        )
        outputs = await say_the_marker(client, http)
        await go_wrong(client, http)
    # Whatever was not sent yet was sent when the processes ended.
    return Seen(reply, answer.json(), outputs, tuple(running.collector.spans), b"")


def chat_body(**changes: Any) -> dict[str, Any]:
    return {"model": "target", "messages": [{"role": "user", "content": f"a {MARKER}?"}]} | changes


async def say_the_marker(client: AsyncClient, http: httpx.AsyncClient) -> list[str]:
    """Outputs, tool calls, stop strings and predictions that are the marker."""
    said = await client.generate(
        f"{MARKER} and", grammar=Grammar("regex", MARKER), max_tokens=40, detail=True
    )
    stopped = await client.generate(
        f"{MARKER} and",
        grammar=Grammar("regex", f"ab{MARKER}cd"),
        stop=[MARKER],
        prediction=f"ab{MARKER}cd",
        max_tokens=40,
    )
    function = {
        "name": MARKER,
        "description": MARKER,
        "parameters": {
            "type": "object",
            "properties": {MARKER: {"enum": [MARKER]}},
            "required": [MARKER],
            "additionalProperties": False,
        },
    }
    called = await http.post(
        "/v1/chat/completions",
        json=chat_body(
            tools=[{"type": "function", "function": function}],
            tool_choice={"type": "function", "function": {"name": MARKER}},
            max_tokens=160,
        ),
    )
    streamed = await http.post(
        "/v1/completions", json={"prompt": MARKER, "max_tokens": 4, "stream": True}
    )
    assert stopped.stop_match == MARKER
    assert streamed.status_code == 200 or MARKER not in streamed.text
    return [said.text, called.text]


async def go_wrong(client: AsyncClient, http: httpx.AsyncClient) -> None:
    """Requests that are at fault in each way that quotes what was sent."""
    wrong: list[GenerateOptions] = [
        {"grammar": Grammar("regex", f"({MARKER}")},
        {"grammar": Grammar("lark", f'start: "{MARKER}" {MARKER}')},
        {"grammar": Grammar("json_schema", f'{{"type": "{MARKER}"}}')},
        {"model": MARKER},
        {"max_tokens": 10**6},
    ]
    for options in wrong:
        with pytest.raises(SpecinferError):
            await client.generate(f"{MARKER} " * 3, **options)
    with pytest.raises(SpecinferError):
        await client.generate(f"{MARKER} " * 5000)
    with pytest.raises(SpecinferError):
        await client.resume(MARKER, 3).collect()
    for body in (
        f"{{{MARKER}".encode(),
        json.dumps(chat_body(**{MARKER: MARKER})).encode(),
        json.dumps(chat_body(stop=[MARKER] * 99)).encode(),
        json.dumps(chat_body(messages=[{"role": MARKER, "content": MARKER}])).encode(),
        json.dumps(chat_body(response_format={"type": MARKER})).encode(),
        json.dumps(chat_body(messages=[{"role": "user", "content": f"{MARKER}\ud800"}])).encode(),
    ):
        headers = {"content-type": "application/json", "x-request-id": f"{MARKER} no id"}
        headers |= {"authorization": f"Bearer {MARKER}", "traceparent": MARKER}
        answer = await http.post(f"/v1/chat/completions?q={MARKER}", content=body, headers=headers)
        assert 400 <= answer.status_code < 500, answer.text
    assert (await http.get(f"/v1/responses/resp_{MARKER}")).status_code == 404
    assert (await http.get(f"/{MARKER}")).status_code == 404


def shape(span: ReceivedSpan, spans: Sequence[ReceivedSpan]) -> list[Any]:
    """The tree below a span as nested lists; equal rounds in a row are told once."""
    found: list[Any] = []
    for child in children_of(span, spans):
        below = shape(child, spans)
        entry = [f"{child.name} {child.kind}", *([below] if below else [])]
        if child.name != "round" or found[-len(entry) :] != entry:
            found += entry
    return found


def rounds_in(tree: list[Any]) -> list[Any]:
    """The shapes of the rounds of a request's tree, after checking what stands before them."""
    assert tree[: len(BEFORE)] == BEFORE
    rest = tree[len(BEFORE) :]
    assert rest[::2] == ["round INTERNAL"] * (len(rest) // 2)
    return rest[1::2]


def check_rounds(rounds: list[Any]) -> None:
    assert rounds[0] == FIRST_ROUND
    assert all(one in (LATER_ROUND, LAST_ROUND) for one in rounds[1:])
    assert LATER_ROUND in rounds


def test_a_call_of_the_sdk_is_one_trace_down_to_redis(seen: Seen) -> None:
    spans = seen.sdk_trace()
    (root,) = roots_of(spans)
    assert (root.service, root.name, root.kind) == ("application", "chat target", "CLIENT")
    (server,) = children_of(root, spans)
    assert (server.service, server.name, server.kind) == (
        "specinfer-router",
        "chat target",
        "SERVER",
    )
    check_rounds(rounds_in(shape(server, spans)))
    assert {(span.service, span.name.split()[0]) for span in spans if span.kind == "SERVER"} == {
        ("specinfer-router", "chat"),
        ("specinfer-draft", "draft"),
        ("specinfer-verify", "verify"),
    }
    assert not any(span.failed or span.links for span in spans)


def test_a_call_over_http_goes_on_with_the_callers_trace(seen: Seen) -> None:
    spans = seen.trace(TURN)
    (root,) = roots_of(spans)
    assert root.parent_id == PARENT
    assert (root.service, root.kind) == ("specinfer-router", "SERVER")
    assert root.name == "POST /v1/chat/completions"
    (request,) = children_of(root, spans)
    assert (request.name, request.kind) == ("chat target", "INTERNAL")
    check_rounds(rounds_in(shape(request, spans)))
    assert {key: root.attributes[key] for key in root.attributes if key != "server.port"} == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/chat/completions",
        "server.address": "127.0.0.1",
        "specinfer.request.id": "request-2",
        "url.scheme": "http",
    }
    assert seen.http["id"].endswith(request.attributes["gen_ai.conversation.id"])


def test_the_spans_say_what_the_answer_says(seen: Seen) -> None:
    spans, done = seen.sdk_trace(), seen.sdk
    (root,) = roots_of(spans)
    (server,) = children_of(root, spans)
    summed_up = {
        "gen_ai.response.finish_reasons": [done.finish_reason],
        "gen_ai.usage.input_tokens": done.usage.num_prompt_tokens,
        "gen_ai.usage.output_tokens": done.usage.num_completion_tokens,
        "specinfer.cached_tokens": done.usage.num_cached_tokens,
        "specinfer.rounds": done.speculation.num_rounds,
        "specinfer.drafts": done.speculation.num_drafts,
        "specinfer.draft_tokens": done.speculation.num_draft_tokens,
        "specinfer.accepted_tokens": done.speculation.num_accepted_tokens,
        "specinfer.accepted_tokens_per_depth": list(done.speculation.num_accepted_tokens_per_pos),
    } | {f"specinfer.root_only.{why}": n for why, n in done.speculation.root_only_reasons}
    both = summed_up | {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "specinfer",
        "gen_ai.request.model": "target",
        "gen_ai.request.max_tokens": TOKENS,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": done.seed,
        "gen_ai.response.id": done.session_id,
        "gen_ai.response.model": "target",
        "gen_ai.conversation.id": done.session_id,
        "specinfer.request.id": "request-1",
    }
    places = {"server.address", "server.port"}
    assert {key: root.attributes[key] for key in root.attributes if key not in places} == both
    assert places <= set(root.attributes)
    workers = {"specinfer.drafter", "specinfer.verifier"}
    assert {key: server.attributes[key] for key in server.attributes if key not in workers} == (
        both | {"specinfer.moves": 0, "specinfer.outcome": done.finish_reason}
    )
    assert workers <= set(server.attributes)
    assert [name for _, name, _ in server.events] == ["first tokens"]


def test_each_round_says_what_it_did(seen: Seen) -> None:
    spans = seen.sdk_trace()
    rounds = [span for span in spans if span.name == "round"]
    rounds.sort(key=lambda span: span.start)
    assert len(rounds) == len(seen.sdk.rounds)
    for span, facts in zip(rounds, seen.sdk.rounds, strict=True):
        wanted: dict[str, Any] = {
            "specinfer.epoch": facts.epoch,
            "specinfer.draft_tokens": facts.num_draft_tokens,
            "specinfer.accepted_tokens": facts.num_accepted_tokens,
            "specinfer.tree.nodes": facts.num_draft_tokens + 1,
            "specinfer.tree.depth": facts.draft_depth,
        }
        if facts.root_only_reason:
            wanted["specinfer.root_only_reason"] = facts.root_only_reason
        assert span.attributes == wanted
        propose, verify, commit = children_of(span, spans)
        assert propose.attributes["specinfer.hedged"] is False
        assert verify.attributes["server.address"] == "127.0.0.1"
        (redis,) = children_of(commit, spans)
        assert redis.attributes["db.system.name"] == "redis"
        assert redis.attributes["db.operation.name"] == "commit"
        for parent in (propose, verify, commit):
            assert span.start <= parent.start <= parent.end <= span.end


def test_a_request_that_asks_for_no_detail_has_no_rounds(seen: Seen) -> None:
    (called,) = [
        span for span in seen.spans if span.attributes.get("gen_ai.request.max_tokens") == 160
    ]
    spans = seen.trace(called.trace_id)
    assert not [span for span in spans if span.name in ("round", "verify step", "draft propose")]
    assert called.attributes["specinfer.rounds"] > 0


def test_errors_are_told_by_their_kind(seen: Seen) -> None:
    failed = {span.attributes["error.type"] for span in seen.spans if span.failed}
    assert {"INVALID_REQUEST", "NOT_FOUND"} <= failed
    named = [span.name for span in seen.spans if span.name.startswith("GET")]
    assert "GET /v1/responses/{response_id}" in named


def test_no_text_of_anybody_is_in_a_span_or_a_line(seen: Seen) -> None:
    assert len(seen.outputs) == 2
    assert all(MARKER in output for output in seen.outputs)
    assert MARKER not in repr(seen.spans)
    assert MARKER.encode() not in seen.logs


def test_every_line_is_json_and_ends_of_requests_have_their_ids(seen: Seen) -> None:
    lines = [json.loads(line) for line in seen.logs.splitlines() if line.startswith(b"{")]
    services = {line["service"] for line in lines}
    assert services == {"specinfer-router", "specinfer-draft", "specinfer-verify"}
    for line in lines:
        assert {"time", "level", "logger", "message"} <= set(line)
    ends = {line["request_id"]: line for line in lines if line["message"] == "request ended"}
    first = ends["request-1"]
    assert first["session_id"] == seen.sdk.session_id
    assert first["outcome"] == seen.sdk.finish_reason
    assert first["trace_id"] == seen.sdk_trace()[0].trace_id
    assert {line["outcome"] for line in ends.values()} >= {"invalid_request", "stop", "length"}
