"""One call's answer, as a stream of chunks or as one body, whatever the shape of its choices.

Each round of a choice becomes one chunk, whose id names the tokens sent so far, so that a stream
that breaks between any two chunks goes on without losing or repeating a token. This module knows
nothing of HTTP, nor of how a choice looks: a `ChoiceWriter` does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from specinfer.errors import Cancelled, InternalError
from specinfer.messages import (
    Capabilities,
    Finished,
    GenerateEvent,
    RoundDetail,
    Started,
    TokensEvent,
)
from specinfer_router.gateway.choices import Stream, event_id, merged
from specinfer_router.gateway.errors import renaming
from specinfer_router.gateway.sse import ServerEvent, encode_json
from specinfer_router.gateway.usage import RoundCounts, metrics_of, usage_of, usage_so_far


class ChoiceWriter(Protocol):
    """Gives one choice its shape; it holds what of the choice has been written."""

    def begin(self, started: Started) -> None:
        """The choice has started."""
        ...

    def opening(self) -> dict[str, Any] | None:
        """The chunk before the first token, or None."""
        ...

    def delta(self, event: TokensEvent) -> dict[str, Any] | None:
        """The chunk of a round, or None while it shows nothing."""
        ...

    def ending(self, finished: Finished) -> dict[str, Any]:
        """The last chunk."""
        ...

    def whole(self, events: Sequence[TokensEvent], finished: Finished) -> dict[str, Any]:
        """The choice in one piece; nothing else was called before."""
        ...


@dataclass(frozen=True)
class AnswerOptions:
    """What an answer says beside its choices.

    Attributes:
        id_prefix: stands before the first choice's session in the answer's id.
        object: OpenAI's name of the kind of the whole answer.
        chunk_object: the same of a chunk.
        choices_per_prompt: choices that share one prompt.
        include_usage: send usage and metrics last.
        continuous_usage: send usage with every chunk.
        detail: send each round's facts and the lists over the rounds.
        service_tier: as it was asked for, or None.
        parameters: the caller's names of fields that the router calls otherwise.
    """

    id_prefix: str
    object: str
    chunk_object: str
    choices_per_prompt: int = 1
    include_usage: bool = False
    continuous_usage: bool = False
    detail: bool = False
    service_tier: str | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)


class Answer:
    """What has come of a call's choices, and what is to be said about it."""

    def __init__(
        self, writers: Sequence[ChoiceWriter], options: AnswerOptions, served: Capabilities
    ) -> None:
        """Prepare for as many choices as there are writers."""
        self._writers = writers
        self._options = options
        self._head: dict[str, Any] = {
            "id": "",
            "object": options.chunk_object,
            "created": int(time.time()),
            "model": served.model,
            "system_fingerprint": fingerprint(served),
        }
        if options.service_tier is not None:
            tier = options.service_tier
            self._head["service_tier"] = "default" if tier == "auto" else tier
        self._started: list[Started] = []
        self._counts = [RoundCounts() for _ in writers]
        self._resumed = False
        self._offsets = [0 for _ in writers]
        self._finished: list[Finished | None] = [None for _ in writers]

    async def stream(self, streams: Sequence[Stream]) -> AsyncGenerator[ServerEvent, None]:
        """The answer in chunks; raises SpecinferError, the streams' own.

        The first event comes as soon as all choices have started.
        """
        async with aclosing(self._events(streams)) as events:
            async for index, event in events:
                if not isinstance(event, Started):
                    chunk = self._chunk(index, event)
                    if chunk is not None:
                        yield chunk
                elif len(self._started) == len(self._writers):
                    for opening in self._openings():
                        yield opening
        if self._options.include_usage:
            yield self._event({"choices": []} | self._summary())

    async def body(self, streams: Sequence[Stream]) -> bytes:
        """The answer in one piece, as JSON; raises SpecinferError, the streams' own."""
        rounds: list[list[TokensEvent]] = [[] for _ in self._writers]
        async with aclosing(self._events(streams)) as events:
            async for index, event in events:
                if isinstance(event, TokensEvent):
                    rounds[index].append(event)
        # Long answers with logprobs take their time to write down.
        return await asyncio.to_thread(self._whole, rounds)

    def _whole(self, rounds: Sequence[Sequence[TokensEvent]]) -> bytes:
        choices = [
            {"index": index} | writer.whole(rounds[index], end)
            for index, (writer, end) in enumerate(zip(self._writers, self._ends(), strict=True))
        ]
        head = self._head | {"object": self._options.object}
        return encode_json(head | {"choices": choices} | self._summary())

    async def _events(
        self, streams: Sequence[Stream]
    ) -> AsyncGenerator[tuple[int, GenerateEvent], None]:
        with renaming(self._options.parameters):
            async with aclosing(merged(streams)) as events:
                async for index, event in events:
                    self._take(index, event)
                    yield index, event

    def _take(self, index: int, event: GenerateEvent) -> None:
        if isinstance(event, Started):
            self._start(event)
        elif isinstance(event, TokensEvent):
            self._offsets[index] = event.offset + len(event.token_ids)
            self._counts[index].add(event.round)
        elif event.reason == "cancelled":
            raise Cancelled("the generation was cancelled")
        else:
            self._finished[index] = event

    def _start(self, started: Started) -> None:
        if not self._started:
            self._head["id"] = self._options.id_prefix + started.session_id
        self._writers[len(self._started)].begin(started)
        self._started.append(started)

    def resume_at(self, offsets: Sequence[int]) -> None:
        """Say what a resumed stream has sent before: its beginning, and so many tokens."""
        self._resumed = True
        self._offsets = list(offsets)

    def _openings(self) -> list[ServerEvent]:
        if self._resumed:
            return [ServerEvent(None)]
        chunks = [(index, writer.opening()) for index, writer in enumerate(self._writers)]
        events = [self._choice_event(index, chunk) for index, chunk in chunks if chunk is not None]
        if not events:
            return [ServerEvent(None)]
        # A resumed stream has no openings: whoever has not seen them all has to begin again.
        return [*(replace(event, id="") for event in events[:-1]), events[-1]]

    def _chunk(self, index: int, event: GenerateEvent) -> ServerEvent | None:
        writer = self._writers[index]
        if isinstance(event, Finished):
            return self._choice_event(index, writer.ending(event))
        assert isinstance(event, TokensEvent)
        chunk = writer.delta(event)
        if chunk is None:
            return None
        extra = {}
        if event.detail is not None:
            extra["speculation"] = speculation_of_round(event, event.detail)
        return self._choice_event(index, chunk, extra)

    def _choice_event(
        self, index: int, chunk: dict[str, Any], extra: dict[str, Any] | None = None
    ) -> ServerEvent:
        content: dict[str, Any] = {"choices": [{"index": index} | chunk]}
        if self._options.continuous_usage:
            content |= {"usage": usage_so_far(self._num_prompt_tokens(), sum(self._offsets))}
        elif self._options.include_usage:
            content |= {"usage": None}
        return self._event(content | extra if extra else content)

    def _event(self, content: dict[str, Any]) -> ServerEvent:
        sessions = [started.session_id for started in self._started]
        return ServerEvent(self._head | content, event_id(sessions, self._offsets))

    def _num_prompt_tokens(self) -> int:
        prompts = self._started[:: self._options.choices_per_prompt]
        return sum(started.num_prompt_tokens for started in prompts)

    def _ends(self) -> list[Finished]:
        ends = [end for end in self._finished if end is not None]
        if len(ends) != len(self._finished):
            raise InternalError("a stream ended without its last event")
        return ends

    def _summary(self) -> dict[str, Any]:
        ends = self._ends()
        return {
            "usage": usage_of(ends, self._options.choices_per_prompt),
            "metrics": metrics_of(ends, self._counts, detail=self._options.detail),
            "seeds": [started.seed for started in self._started],
        }


def fingerprint(served: Capabilities) -> str:
    """Changes whenever the same request may give another answer: with the model or our version."""
    return f"fp_{served.model_hash[:12]}_{served.version}"


def speculation_of_round(event: TokensEvent, detail: RoundDetail) -> dict[str, Any]:
    """What a round guessed and what became of it, for whoever draws it."""
    return {
        "tokens": [
            {"text": text, "accepted": index < event.num_accepted_tokens}
            for index, text in enumerate(detail.token_texts)
        ],
        "tree": {
            "texts": list(detail.node_texts),
            "parents": list(detail.tree.parents),
            "accepted": list(detail.accepted),
        },
        "round": event.round._asdict(),
    }
