"""POST /v1/completions: a text goes in, its continuation comes out.

Checks, calls, translates. What a body means is in `completions_request`; this module knows nothing
of conversations, sessions or workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from specinfer.messages import Finished, Started, TokensEvent
from specinfer_router.gateway.answers import Answer, AnswerOptions
from specinfer_router.gateway.body import parse_body
from specinfer_router.gateway.calls import caller_of, request_id_of
from specinfer_router.gateway.choices import LAST_EVENT_ID, check_number, resumed_streams
from specinfer_router.gateway.completions_request import CompletionBody, completion_requests
from specinfer_router.gateway.errors import renaming
from specinfer_router.gateway.logprobs import legacy_logprobs
from specinfer_router.gateway.replies import reply
from specinfer_router.gateway.sse import StreamSettings
from specinfer_router.router import Router
from specinfer_router.text import Vocabulary

# What the router calls a field, and what a completion does.
PARAMETERS = {
    "token_ids": "prompt",
    "num_logprobs": "logprobs",
    "grammar": "structured_outputs",
    "detail": "speculation.detail",
    "session_id": LAST_EVENT_ID,
    "offset": LAST_EVENT_ID,
}


def completions_handler(
    get_router: Callable[[], Router], settings: StreamSettings
) -> Callable[[Request], Any]:
    """The route's handler."""

    async def completions(request: Request) -> Response:
        body = await parse_body(request, CompletionBody)
        router, caller, request_id = get_router(), caller_of(request), request_id_of(request)
        with renaming(PARAMETERS):
            requests = completion_requests(body, request_id)
        check_number(len(requests), router, caller, "n" if (body.n or 1) > 1 else "prompt")
        writers = [
            _CompletionWriter(
                router.tokenizer.vocabulary,
                echo=each.prompt or "" if body.echo else "",
                with_logprobs=body.logprobs is not None,
                detail=each.detail,
            )
            for each in requests
        ]
        return await reply(
            request,
            router,
            requests,
            Answer(writers, _options(body), router.capabilities()),
            lambda places: resumed_streams(
                router, places, caller, [writer.before for writer in writers]
            ),
            streamed=bool(body.stream),
            settings=settings,
        )

    return completions


def _options(body: CompletionBody) -> AnswerOptions:
    asked = body.stream_options
    return AnswerOptions(
        id_prefix="cmpl-",
        object="text_completion",
        chunk_object="text_completion",
        choices_per_prompt=body.n or 1,
        include_usage=bool(asked and asked.include_usage),
        continuous_usage=bool(asked and asked.continuous_usage_stats),
        detail=bool(body.speculation and body.speculation.detail),
        parameters=PARAMETERS,
    )


class _CompletionWriter:
    """A choice of a completion."""

    def __init__(
        self, vocabulary: Vocabulary, *, echo: str, with_logprobs: bool, detail: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._echo = echo
        self._with_logprobs = with_logprobs
        self._detail = detail
        self._num_characters = 0

    @property
    def before(self) -> Callable[[TokensEvent], None] | None:
        """Takes what a resumed stream has told before, where what follows depends on it."""
        # Where in the text a token stands is known only from those before it.
        return self._read_before if self._with_logprobs else None

    def begin(self, started: Started) -> None:
        """Nothing of a completion follows from its session."""

    def opening(self) -> dict[str, Any] | None:
        return _choice(self._echo) if self._echo else None

    def delta(self, event: TokensEvent) -> dict[str, Any] | None:
        if not (event.text or event.logprobs or self._detail):
            return None
        return _choice(event.text, self._logprobs((event,)))

    def ending(self, finished: Finished) -> dict[str, Any]:
        return _choice("", None, finished)

    def whole(self, events: Sequence[TokensEvent], finished: Finished) -> dict[str, Any]:
        text = self._echo + "".join(event.text for event in events)
        return _choice(text, self._logprobs(events), finished)

    def _logprobs(self, events: Sequence[TokensEvent]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        logprobs = [item for event in events for item in event.logprobs]
        found = legacy_logprobs(logprobs, self._vocabulary, self._num_characters)
        # Tokens that are sent again come without logprobs, and stand in the text all the same.
        self._pass_over([token_id for event in events for token_id in event.token_ids])
        return found

    def _pass_over(self, token_ids: Sequence[int]) -> None:
        special_ids = self._vocabulary.special_ids
        kept = [token_id for token_id in token_ids if token_id not in special_ids]
        self._num_characters += sum(map(len, self._vocabulary.token_texts(kept)))

    def _read_before(self, event: TokensEvent) -> None:
        self._pass_over(event.token_ids)


def _choice(
    text: str, logprobs: dict[str, Any] | None = None, finished: Finished | None = None
) -> dict[str, Any]:
    choice = {"text": text, "logprobs": logprobs}
    choice["finish_reason"] = finished.reason if finished else None
    if finished is not None:
        # vLLM's name for the stop string or token that ended the text.
        choice["stop_reason"] = finished.stop_match or None
    return choice
