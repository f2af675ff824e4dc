"""Chats, conversations, cancelling and explaining; options of structured output; newer routers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from specinfer import (
    AsyncClient,
    ChatMessage,
    Client,
    Conversation,
    Grammar,
    InvalidRequest,
    NotFound,
    RetryPolicy,
    ToolCall,
    Unavailable,
)
from specinfer.options import build_request
from specinfer.testing import FakeReply, FakeRouter
from specinfer.v1 import router_pb2

ONCE = RetryPolicy(max_attempts=1)
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def test_a_question_a_list_and_a_conversation() -> None:
    with FakeRouter("Four.") as router, Client(router.address) as client:
        reply = client.chat("Two and two?", max_tokens=5, temperature=0)
        assert (reply.text, reply.message) == ("Four.", ChatMessage("assistant", "Four."))
        assert reply.completion.finish_reason == "stop"
        client.chat([{"role": "user", "content": "And three?"}])
        talk = Conversation.begin(system="Be brief.").ask("Hello")
        talk = talk.answer(client.chat(talk)).ask("Again")
        client.chat(talk)
        with client.stream(messages=talk.messages) as stream:
            talk = talk.answer(stream.collect())
    assert [request.messages for request in router.requests] == [
        (ChatMessage("user", "Two and two?"),),
        (ChatMessage("user", "And three?"),),
        (ChatMessage("system", "Be brief."), ChatMessage("user", "Hello")),
        talk.messages[:4],
        talk.messages[:4],
    ]
    assert talk.messages[2:] == (
        ChatMessage("assistant", "Four."),
        ChatMessage("user", "Again"),
        ChatMessage("assistant", "Four."),
    )
    assert Conversation.begin().messages == ()


async def test_tools_and_their_answers_reach_the_router() -> None:
    call = ToolCall("c1", "weather", '{"city": "Ulm"}')
    talk = Conversation().ask("Rain?").call_tools(call).tool_result("c1", "no", name="weather")
    with FakeRouter("No.") as router:
        async with AsyncClient(router.address) as client:
            await client.chat(talk, tools=[TOOL])
            turns: list[dict[str, Any]] = [
                {"role": "user", "content": "Rain?"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "c1", "name": "weather", "arguments": call.arguments}],
                },
                {"role": "tool", "content": "no", "tool_call_id": "c1", "name": "weather"},
            ]
            await client.chat(turns, tools=[json.dumps(TOOL)])
    first, second = router.requests
    assert first.messages == second.messages == talk.messages
    assert json.loads(first.tools[0]) == json.loads(second.tools[0]) == TOOL


async def test_extras_reach_the_router() -> None:
    with FakeRouter("x") as router:
        async with AsyncClient(router.address) as client:
            await client.generate(
                "hi", prediction="so it goes", affinity_key="user-7", priority=3, detail=True
            )
            await client.generate("hi", json_schema=SCHEMA)
    extras, schema = router.requests
    assert (extras.prediction, extras.affinity_key) == ("so it goes", "user-7")
    assert (extras.priority, extras.detail, extras.grammar) == (3, True, None)
    assert schema.grammar is not None
    assert (schema.grammar.kind, json.loads(schema.grammar.text)) == ("json_schema", SCHEMA)


@pytest.mark.parametrize(
    ("options", "grammar"),
    [
        ({"json_schema": '{"type": "object"}'}, Grammar("json_schema", '{"type": "object"}')),
        ({"json_object": True}, Grammar("json_object")),
        ({"json_object": False}, None),
        ({"regex": "[a-z]+"}, Grammar("regex", "[a-z]+")),
        ({"choice": ["yes", "nö"]}, Grammar("choice", '["yes", "nö"]')),
        ({"grammar": Grammar("lark", "start: /a+/")}, Grammar("lark", "start: /a+/")),
        ({}, None),
    ],
)
def test_each_form_of_structured_output(options: Any, grammar: Grammar | None) -> None:
    assert build_request("hi", options).grammar == grammar


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": "[]"}, "json_schema"),
        ({"json_schema": {"a": object()}}, "json_schema"),
        ({"json_object": "yes"}, "json_object"),
        ({"regex": ""}, "regex"),
        ({"regex": 3}, "regex"),
        ({"choice": []}, "choice"),
        ({"choice": ["a", ""]}, "choice"),
        ({"choice": "ab"}, "choice"),
        ({"grammar": "start: x"}, "grammar"),
        ({"regex": "a", "choice": ["a"]}, "choice"),
        ({"tools": [TOOL]}, "tools"),
        ({"prediction": 3}, "prediction"),
        ({"affinity_key": "a\n"}, "affinity_key"),
        ({"priority": 1.5}, "priority"),
        ({"priority": 101}, "priority"),
        ({"detail": 1}, "detail"),
    ],
)
def test_bad_extras_are_named(options: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build_request("hi", options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x", "colour": "red"},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
        {"role": "assistant", "content": "x", "tool_calls": "call"},
        {"role": "tool", "content": "x", "tool_call_id": 7},
        ChatMessage("assistant", "x", tool_calls=(ToolCall("1", "f", 3),)),  # type: ignore[arg-type]
    ],
)
def test_bad_messages_are_named(message: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build_request(None, {"messages": [message]})
    assert caught.value.field == "messages"
    with pytest.raises(InvalidRequest, match="JSON object"):
        build_request(None, {"messages": [ChatMessage("user", "x")], "tools": ["7"]})


async def test_a_session_is_cancelled_for_good() -> None:
    with FakeRouter("one two three four") as router:
        async with AsyncClient(router.address) as client:
            async with client.stream("hi") as stream:
                await anext(stream)
            assert stream.started is not None
            session_id = stream.started.session_id
            await client.cancel(session_id)
            assert (await client.resume(session_id, 3).collect()).finish_reason == "cancelled"
            with pytest.raises(NotFound):
                await client.cancel("nobody")
            with pytest.raises(InvalidRequest, match="session_id"):
                await client.cancel("")
    assert router.cancelled_sessions == [session_id]


async def test_explain_asks_the_router_that_knows() -> None:
    with FakeRouter("a b c d e") as first, FakeRouter("a b c d e") as second:
        with Client(second.address) as client:
            completion = client.generate("hi", request_id="mine")
        async with AsyncClient([first.address, second.address], retry=ONCE) as both:
            report = await both.explain("mine")
            with pytest.raises(NotFound):
                await both.explain("nobody's")
            second.close()
            with pytest.raises(Unavailable):
                await both.explain("mine")
    assert report.session_id == completion.session_id
    assert report.outcome == "stop"
    assert [one.num_tokens for one in report.rounds] == [3, 2]
    assert [one.offset for one in report.rounds] == [0, 3]


async def test_events_of_a_newer_router_are_passed_over() -> None:
    class Newer(FakeRouter):
        async def Generate(
            self, request: Any, context: Any
        ) -> AsyncIterator[router_pb2.GenerateResponse]:
            async for event in super().Generate(request, context):
                yield router_pb2.GenerateResponse()
                yield event

        async def Resume(
            self, request: Any, context: Any
        ) -> AsyncIterator[router_pb2.ResumeResponse]:
            async for event in super().Resume(request, context):
                yield router_pb2.ResumeResponse()
                yield event

    with Newer(FakeReply("one two three four five", break_at=(3,))) as router:
        async with AsyncClient(router.address) as client:
            assert (await client.generate("hi")).text == "one two three four five"
    assert len(router.resumed) == 1
