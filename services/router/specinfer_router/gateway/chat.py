"""POST /v1/chat/completions: a conversation goes in, the assistant's turn comes out.

Checks, calls, translates. What a body means is in `chat_request`, what calls of tools look like in
`tools`; this module knows nothing of sessions or workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from specinfer.messages import (
    Finished,
    GenerateRequest,
    Started,
    TokensEvent,
)
from specinfer_router.gateway.answers import Answer, AnswerOptions
from specinfer_router.gateway.body import parse_body
from specinfer_router.gateway.calls import caller_of, request_id_of
from specinfer_router.gateway.chat_request import ChatBody, chat_requests, tool_plan_of
from specinfer_router.gateway.choices import LAST_EVENT_ID, check_number, resumed_streams
from specinfer_router.gateway.errors import renaming
from specinfer_router.gateway.logprobs import chat_logprobs
from specinfer_router.gateway.replies import reply
from specinfer_router.gateway.sse import StreamSettings
from specinfer_router.gateway.tools import ToolPlan
from specinfer_router.gateway.tools_parser import (
    ArgumentsDelta,
    CallStart,
    ContentDelta,
    TextParser,
    ToolDelta,
    ToolParser,
)
from specinfer_router.router import Router
from specinfer_router.text import Vocabulary

# What the router calls a field, and what a chat completion does.
PARAMETERS = {
    "prompt": "messages",
    "token_ids": "messages",
    "num_logprobs": "top_logprobs",
    "detail": "speculation.detail",
    "session_id": LAST_EVENT_ID,
    "offset": LAST_EVENT_ID,
    "affinity_key": "prompt_cache_key",
}


def chat_handler(
    get_router: Callable[[], Router], settings: StreamSettings
) -> Callable[[Request], Any]:
    """The route's handler."""

    async def chat(request: Request) -> Response:
        body = await parse_body(request, ChatBody)
        router, caller, request_id = get_router(), caller_of(request), request_id_of(request)
        plan, requests = await _understood(body, router.tokenizer.chat_template, request_id)
        check_number(len(requests), router, caller, "n")
        writers = [_ChatWriter(body, plan, router.tokenizer.vocabulary) for _ in requests]
        options = _options(body, _parameters(body, plan))
        return await reply(
            request,
            router,
            requests,
            Answer(writers, options, router.capabilities()),
            lambda places: resumed_streams(
                router, places, caller, [writer.before for writer in writers]
            ),
            streamed=bool(body.stream),
            settings=settings,
        )

    return chat


async def _understood(
    body: ChatBody, template: str, request_id: str
) -> tuple[ToolPlan, list[GenerateRequest]]:
    def understand() -> tuple[ToolPlan, list[GenerateRequest]]:
        with renaming(PARAMETERS):
            plan = tool_plan_of(body, template)
            return plan, chat_requests(body, plan, request_id)

    if body.tools or body.response_format or body.structured_outputs:
        # Schemas may be long, and writing them down takes its time.
        return await asyncio.to_thread(understand)
    return understand()


def _parameters(body: ChatBody, plan: ToolPlan) -> dict[str, str]:
    """The caller's names of fields; what the text must match comes from one of three."""
    source = "tools" if plan.grammar else "response_format"
    return PARAMETERS | {"grammar": "structured_outputs" if body.structured_outputs else source}


def _options(body: ChatBody, parameters: dict[str, str]) -> AnswerOptions:
    asked = body.stream_options
    return AnswerOptions(
        id_prefix="chatcmpl-",
        object="chat.completion",
        chunk_object="chat.completion.chunk",
        choices_per_prompt=body.n or 1,
        include_usage=bool(asked and asked.include_usage),
        continuous_usage=bool(asked and asked.continuous_usage_stats),
        detail=bool(body.speculation and body.speculation.detail),
        parameters=parameters,
        service_tier=body.service_tier,
    )


class _ChatWriter:
    """A choice of a chat completion."""

    def __init__(self, body: ChatBody, plan: ToolPlan, vocabulary: Vocabulary) -> None:
        self._plan = plan
        self._vocabulary = vocabulary
        self._with_logprobs = bool(body.logprobs)
        self._detail = bool(body.speculation and body.speculation.detail)
        self._parser: ToolParser | TextParser = TextParser()

    @property
    def before(self) -> Callable[[TokensEvent], None] | None:
        """Takes what a resumed stream has told before, where what follows depends on it."""
        # Where in a call the text broke is known only from the text before it.
        return self._read_before if self._plan.call_format is not None else None

    def begin(self, started: Started) -> None:
        # Ids of calls follow from the session, so that a resumed stream repeats them.
        self._parser = self._plan.parser(started.session_id)

    def opening(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""})

    def delta(self, event: TokensEvent) -> dict[str, Any] | None:
        delta = _delta(self._parser.push(event.text))
        if delta:
            return self._chunk(delta, event)
        if event.logprobs or self._detail:
            return self._chunk({"content": ""}, event)
        return None

    def ending(self, finished: Finished) -> dict[str, Any]:
        chunk = self._chunk(_delta(self._parser.finish()))
        return chunk | {"finish_reason": self._finish_reason(finished)}

    def whole(self, events: Sequence[TokensEvent], finished: Finished) -> dict[str, Any]:
        deltas = [*self._parser.push("".join(event.text for event in events))]
        deltas += self._parser.finish()
        delta = _delta(deltas)
        message = {"role": "assistant", "content": delta.get("content"), "refusal": None}
        message["annotations"] = []
        if "tool_calls" in delta:
            # The index is a stream's: it says which call a piece belongs to.
            message["tool_calls"] = [
                {key: value for key, value in call.items() if key != "index"}
                for call in delta["tool_calls"]
            ]
        elif message["content"] is None:
            message["content"] = ""
        logprobs = [item for event in events for item in event.logprobs]
        content = chat_logprobs(logprobs, self._vocabulary) if self._with_logprobs else None
        return {
            "message": message,
            "logprobs": None if content is None else {"content": content, "refusal": None},
            "finish_reason": self._finish_reason(finished),
        }

    def _read_before(self, event: TokensEvent) -> None:
        self._parser.push(event.text)

    def _chunk(self, delta: dict[str, Any], event: TokensEvent | None = None) -> dict[str, Any]:
        logprobs = None
        if self._with_logprobs and event is not None:
            content = chat_logprobs(event.logprobs, self._vocabulary)
            logprobs = {"content": content, "refusal": None}
        return {"delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _finish_reason(self, finished: Finished) -> str:
        # A stop string may cut a call off in the middle, which nobody could make then.
        called = self._parser.has_whole_calls and finished.reason == "stop"
        return "tool_calls" if called else finished.reason


def _delta(deltas: Sequence[ToolDelta]) -> dict[str, Any]:
    """What a round brought, as one delta: a chunk a round, so that its id is exact."""
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if isinstance(delta, CallStart):
            function = {"name": delta.name, "arguments": ""}
            head = {"index": delta.index, "id": delta.call_id, "type": "function"}
            calls[delta.index] = head | {"function": function}
        elif isinstance(delta, ArgumentsDelta):
            call = calls.setdefault(
                delta.index, {"index": delta.index, "function": {"arguments": ""}}
            )
            call["function"]["arguments"] += delta.text
    merged: dict[str, Any] = {"content": content} if content else {}
    if calls:
        merged["tool_calls"] = list(calls.values())
    return merged
