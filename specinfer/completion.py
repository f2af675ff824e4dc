"""What a finished call gives back, and how it is put together from a stream's events.

This module knows nothing of channels, retries or the wire.
"""

from __future__ import annotations

from dataclasses import dataclass

from specinfer.errors import InternalError
from specinfer.messages import (
    Finished,
    GenerateEvent,
    RoundFacts,
    SpeculationSummary,
    Started,
    TokenLogprob,
    TokensEvent,
    Usage,
)


@dataclass(frozen=True)
class Completion:
    """Everything that one call generated.

    Attributes:
        text: the generated text, without the stop string that ended it.
        token_ids: the generated tokens.
        logprobs: one entry a token when asked for, else empty.
        finish_reason: "stop", "length" or "cancelled".
        stop_match: the stop string or token that ended it, or "".
        usage: token counts.
        speculation: summary over all rounds.
        seed: the seed in use; sending it again repeats the tokens.
        model: served model name.
        request_id: id of the request in logs and errors.
        session_id: id of the session in the store.
        rounds: facts of each round, in order.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    stop_match: str
    usage: Usage
    speculation: SpeculationSummary
    seed: int
    model: str
    request_id: str
    session_id: str
    rounds: tuple[RoundFacts, ...]


class CompletionBuilder:
    """Gathers the events of one stream.

    Attributes:
        started: the first event, or None before it.
        finished: the last event, or None before it.
        num_events: tokens events so far.
    """

    def __init__(self) -> None:
        self.started: Started | None = None
        self.finished: Finished | None = None
        self.num_events = 0
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._rounds: list[RoundFacts] = []

    def add(self, event: GenerateEvent) -> None:
        """Take the next event; raises InternalError when it cannot stand here."""
        if self.finished is not None:
            raise InternalError("the server sent an event after the last one")
        if isinstance(event, Started):
            self.started = event
            return
        if self.started is None:
            raise InternalError("the server's first event was not Started")
        if isinstance(event, Finished):
            self.finished = event
            return
        self._add_tokens(event)

    def _add_tokens(self, event: TokensEvent) -> None:
        self.num_events += 1
        self._text.append(event.text)
        self._token_ids.extend(event.token_ids)
        self._logprobs.extend(event.logprobs)
        self._rounds.append(event.round)

    def build(self) -> Completion:
        """The completion; raises InternalError when the stream ended without its last event."""
        if self.started is None or self.finished is None:
            raise InternalError("the stream ended without its last event")
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            finish_reason=self.finished.reason,
            stop_match=self.finished.stop_match,
            usage=self.finished.usage,
            speculation=self.finished.speculation,
            seed=self.started.seed,
            model=self.started.model,
            request_id=self.started.request_id,
            session_id=self.started.session_id,
            rounds=tuple(self._rounds),
        )
