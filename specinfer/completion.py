"""What a finished call gives back, and how it is put together from a stream's events.

This module knows nothing of channels, retries or the wire.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from specinfer.errors import InternalError, Mismatch
from specinfer.messages import (
    Finished,
    GenerateEvent,
    RoundFacts,
    SpeculationSummary,
    Started,
    Timings,
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
        usage: token counts of the whole completion, whatever part of it was read here.
        speculation: summary over all rounds; of a resumed stream, over those that were read here.
        seed: the seed in use; sending it again repeats the tokens.
        model: served model name.
        request_id: id of the request in logs and errors.
        session_id: id of the session in the store.
        rounds: facts of each round, in order.
        timings: where the time went; of a resumed stream, since it was last resumed.
        offset: index of the first of `token_ids` in the completion: 0, unless the stream was
            resumed from another one's offset.
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
    timings: Timings = field(default_factory=Timings)
    offset: int = 0


class CompletionBuilder:
    """Gathers the events of one stream, and of those that resume it.

    Attributes:
        started: the first event, or None before it.
        finished: the last event, or None before it.
    """

    def __init__(self, offset: int = 0) -> None:
        """Begin with the token at `offset` of the completion."""
        self.started: Started | None = None
        self.finished: Finished | None = None
        self._offset = offset
        self._announced = False
        # Text of the tokens that come a second time, while they do.
        self._repeated: list[str] | None = None
        self._num_repeated = 0
        self._num_parts = 0
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._rounds: list[RoundFacts] = []

    @property
    def offset(self) -> int:
        """Index of the next token in the completion: where a stream that broke is resumed."""
        return self._offset + len(self._token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens gathered."""
        return len(self._token_ids)

    def resumed(self) -> None:
        """What comes next belongs to a stream that goes on where the last one broke."""
        self._announced = False
        self._repeated = None

    def repeated(self) -> None:
        """What comes next is the same completion once more, from its first token on."""
        self._announced = False
        self._repeated, self._num_repeated = [], 0

    def add(self, event: GenerateEvent) -> TokensEvent | None:
        """Take the next event; returns what of it is new.

        Raises:
            InternalError: it cannot stand here.
            Mismatch: what comes a second time is not what came the first time.
        """
        if self.finished is not None:
            raise InternalError("the server sent an event after the last one")
        if isinstance(event, Started):
            self._start(event)
            return None
        if not self._announced:
            raise InternalError("the server's first event was not Started")
        if self._repeated is not None:
            rest = self._after_repeated(self._repeated, event)
            if rest is None:
                return None
            event, self._repeated = rest, None
        if isinstance(event, Finished):
            self.finished = event
            return None
        self._add_tokens(event)
        return event

    def _start(self, started: Started) -> None:
        self._announced = True
        self._num_parts += 1
        if self._repeated is not None and self.started is not None:
            first = replace(self.started, request_id="", session_id="")
            if replace(started, request_id="", session_id="") != first:
                raise _not_the_same(f"{started.model} with another model or prompt")
            self.started = started
        self.started = self.started or started

    def _after_repeated(
        self, texts: list[str], event: TokensEvent | Finished
    ) -> TokensEvent | Finished | None:
        """The part of an event that did not come before; None where all of it did."""
        if isinstance(event, Finished):
            if event.reason == "cancelled":
                return event
            raise _not_the_same("fewer tokens")
        if event.offset != self._num_repeated:
            raise InternalError(f"tokens from {event.offset} on, {self._num_repeated} was due")
        known = self._token_ids[event.offset : event.offset + len(event.token_ids)]
        if list(event.token_ids[: len(known)]) != known:
            raise _not_the_same("other tokens")
        texts.append(event.text)
        self._num_repeated += len(event.token_ids)
        if self._num_repeated < self.num_tokens:
            return None
        told, again = "".join(self._text), "".join(texts)
        if not again.startswith(told):
            raise _not_the_same("another text")
        if len(event.token_ids) == len(known) and again == told:
            self._repeated = None
            return None
        return event._replace(
            offset=self.offset,
            text=again[len(told) :],
            token_ids=event.token_ids[len(known) :],
            num_accepted_tokens=max(0, event.num_accepted_tokens - len(known)),
            logprobs=event.logprobs[len(known) :],
        )

    def _add_tokens(self, event: TokensEvent) -> None:
        if event.offset != self.offset:
            raise InternalError(
                f"the server sent tokens from {event.offset} on where {self.offset} was due"
            )
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
            speculation=self._summary(self.finished),
            seed=self.started.seed,
            model=self.started.model,
            request_id=self.started.request_id,
            session_id=self.started.session_id,
            rounds=tuple(self._rounds),
            timings=self.finished.timings,
            offset=self._offset,
        )

    def _summary(self, finished: Finished) -> SpeculationSummary:
        # A router counts the rounds since it took the stream over; here are those of all parts.
        return finished.speculation if self._num_parts == 1 else summary_of(self._rounds)


def _not_the_same(what: str) -> Mismatch:
    return Mismatch(
        f"the store has lost the session, and the answer cannot be made again: {what} came; "
        "another model may be served now"
    )


def summary_of(rounds: Sequence[RoundFacts]) -> SpeculationSummary:
    """How some rounds were speculated on, all together."""
    deepest = max((one.num_accepted_tokens for one in rounds), default=0)
    per_pos = (
        sum(one.num_accepted_tokens > position for one in rounds) for position in range(deepest)
    )
    reasons = Counter(one.root_only_reason for one in rounds if one.root_only_reason)
    return SpeculationSummary(
        num_rounds=len(rounds),
        num_drafts=sum(one.num_draft_tokens > 0 for one in rounds),
        num_draft_tokens=sum(one.num_draft_tokens for one in rounds),
        num_accepted_tokens=sum(one.num_accepted_tokens for one in rounds),
        num_accepted_tokens_per_pos=tuple(per_pos),
        root_only_reasons=tuple(sorted(reasons.items())),
    )
