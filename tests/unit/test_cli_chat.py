"""`specinfer chat` from a pipe: what is asked, what its commands change, what they refuse."""

from __future__ import annotations

import json
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


def run(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=text)


def text_of(request: GenerateRequest, count: int = 9) -> str:
    return "".join(f" w{token}" for token in fake_tokens(request, count))


def test_chat_keeps_the_conversation(router: FakeRouter) -> None:
    lines = "first\n\nsecond\n/stats\n/reset\nthird\n/nonsense\n/quit\nnever\n"
    result = run("chat", "--router", router.address, "--system", "short", text=lines)
    assert result.exit_code == 0, result.output
    first, second, third = router.requests
    assert first.messages is not None
    assert first.messages == (ChatMessage("system", "short"), ChatMessage("user", "first"))
    assert second.messages == (
        *first.messages,
        ChatMessage("assistant", text_of(first)),
        ChatMessage("user", "second"),
    )
    assert third.messages == (ChatMessage("system", "short"), ChatMessage("user", "third"))
    assert result.stdout == "".join(text_of(request) + "\n" for request in router.requests)
    assert "18 tokens" in result.stderr
    assert "6 rounds, 3.00 tokens a round, 12 of 12 guesses confirmed" in result.stderr
    assert "confirmed by depth: 200%" in result.stderr
    assert "unknown command /nonsense" in result.stderr


def test_chat_commands_change_the_next_request(router: FakeRouter) -> None:
    lines = [
        *("/set temperature 0.7", "/set top_k 9", "/set max_nodes 5", "/set seed 3", "one"),
        *("/set top_k none", "/speculation off", "/system be short", "/settings", "two"),
        *("/system", "/speculation on", "three", "/again"),
    ]
    result = run("chat", "--router", router.address, text="\n".join(lines))
    assert result.exit_code == 0, result.output
    one, two, three, again = router.requests
    assert (one.sampling.temperature, one.sampling.top_k, one.sampling.seed) == (0.7, 9, 3)
    assert (one.speculation.enabled, one.speculation.max_nodes) == (True, 5)
    assert (two.sampling.top_k, two.speculation.enabled) == (0, False)
    assert two.messages is not None
    assert two.messages[0] == ChatMessage("system", "be short")
    assert three.messages is not None
    assert [message.role for message in three.messages][:2] == ["user", "assistant"]
    assert three.speculation.enabled
    assert (again.speculation.enabled, again.messages) == (False, three.messages)
    assert "temperature         0.7" in result.stderr
    assert "speculation         off" in result.stderr
    assert "identical: all 9 tokens; speculation ran at" in result.stderr
    assert not any(request.detail for request in router.requests)


def test_again_tells_of_another_text(router: FakeRouter) -> None:
    async def wrong(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        token_ids = [1, 2, 3] if request.speculation.enabled else [1, 2, 4]
        yield started_event(request)
        yield tokens_event(request, 0, token_ids[:2])
        yield tokens_event(request, 2, token_ids[2:])
        yield finished_event(3, 2)

    router.script = wrong
    result = run("chat", "--router", router.address, text="one\n/again\n")
    assert "NOT identical: the first 2 tokens are" in result.stderr


def test_chat_commands_refuse_what_they_cannot_do(router: FakeRouter) -> None:
    for line, reason in (
        ("/again", "nothing was asked yet"),
        ("/rounds", "no rounds are known"),
        ("/speculation maybe", "/speculation on, or /speculation off"),
        ("/set", "/set NAME VALUE"),
        ("/set top_q 1", "there is no setting 'top_q'"),
        ("/set top_k many", "top_k is a whole number or none"),
        ("/set top_p 9", "top_p is between 0 and 1"),
        ("/set max_nodes -1", "max_nodes is between 0 and"),
        ("/save", "/save FILE"),
        ("/save /nowhere/at/all", "cannot write"),
    ):
        result = run("chat", "--router", router.address, text=f"{line}\nhello\n")
        assert result.exit_code == 0, result.output
        assert reason in result.stderr, line
        # The chat goes on, with the settings as they were.
        assert router.requests[-1].sampling.greedy
    assert len(router.requests) == 10


def test_a_chat_is_saved_once(router: FakeRouter, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    lines = f"/system short\nhello\n/save {path}\n/save {path}\n/stats\n"
    result = run("chat", "--router", router.address, text=lines)
    saved = json.loads(path.read_text())
    request = router.requests[0]
    assert saved["system"] == "short"
    assert saved["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": text_of(request)},
    ]
    assert saved["settings"]["temperature"] == 0
    assert saved["settings"]["speculation"]["enabled"] is True
    assert saved["last_request_id"] == request.request_id
    assert saved["statistics"]["num_tokens"] == 9
    assert "is there already" in result.stderr
    assert f"specinfer explain {request.request_id}" in result.stderr


def test_chat_ends_with_its_input_and_with_an_error(router: FakeRouter) -> None:
    async def refuse(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        yield started_event(request)
        raise ResourceExhausted("full")

    assert run("chat", "--router", router.address, text="hello").exit_code == 0
    router.script = refuse
    result = run("chat", "--router", router.address, text="hello\nagain\n")
    assert result.exit_code == 1
    assert "full" in result.stderr
    router.capabilities = capabilities(chat=False)
    refused = run("chat", "--router", router.address, text="hello\n")
    assert refused.exit_code == 2
