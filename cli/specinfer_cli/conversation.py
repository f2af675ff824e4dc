"""A conversation with a cluster: what was said, how fast, and the same question once more.

This module knows nothing of terminals: who shows the events is told by the caller.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specinfer import (
    ChatMessage,
    Client,
    Completion,
    RoundDetail,
    SpeculationOptions,
    TokensEvent,
)
from specinfer.errors import InvalidRequest
from specinfer.options import GenerateOptions
from specinfer_cli.statistics import Statistics

MAX_TREES = 24

Show = Callable[[TokensEvent], None]


@dataclass(frozen=True)
class Answer:
    """One answer and how long it took.

    Attributes:
        completion: what came.
        speculated: whether guessing was on.
        seconds: from the call to the last event.
        stream_tokens: tokens after the first event.
        stream_seconds: from the first event to the last.
    """

    completion: Completion
    speculated: bool
    seconds: float
    stream_tokens: int
    stream_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of the stream itself; of the whole call when it had a single event."""
        if self.stream_tokens and self.stream_seconds:
            return self.stream_tokens / self.stream_seconds
        return len(self.completion.token_ids) / self.seconds


@dataclass(frozen=True)
class PlainSpeed:
    """How fast the cluster is without guesses.

    Attributes:
        tokens_per_second: the speed.
        source: who measured it, in a few words.
    """

    tokens_per_second: float
    source: str


@dataclass(frozen=True)
class Comparison:
    """The same question answered with speculation and without.

    Attributes:
        identical: whether all tokens are equal.
        num_equal: tokens from the start on that are.
        ratio: speed with speculation by the speed without.
    """

    identical: bool
    num_equal: int
    ratio: float


@dataclass
class Conversation:
    """A conversation with one cluster.

    Attributes:
        client: the open client.
        options: options of every call.
        system: system message, or None.
        turns: what was said, without the system message.
        statistics: sums over all answers since the start.
        last: the newest answer, or None.
        trees: the newest answer's rounds, where they were asked for; the last ones of a long one.
    """

    client: Client
    options: GenerateOptions
    system: str | None = None
    turns: list[ChatMessage] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    last: Answer | None = None
    trees: deque[RoundDetail] = field(default_factory=lambda: deque(maxlen=MAX_TREES))
    _asked: GenerateOptions | None = None
    _plain: list[Answer] = field(default_factory=list)

    @property
    def speculating(self) -> bool:
        """Whether the next answer is guessed ahead."""
        return speculation_of(self.options).enabled

    def speculate(self, enabled: bool) -> None:
        """Turn guessing on or off for the next answers."""
        chosen = speculation_of(self.options)
        self.options["speculation"] = dataclasses.replace(chosen, enabled=enabled)

    def ask(self, text: str, show: Show) -> Answer:
        """Stream the answer to `text` through `show`; an error or an interrupt forgets the turn."""
        question = ChatMessage("user", text)
        first = [ChatMessage("system", self.system)] if self.system is not None else []
        options = self.options.copy()
        options["messages"] = [*first, *self.turns, question]
        answer = self._run(options, show)
        self._asked = options
        self.turns += [question, ChatMessage("assistant", answer.completion.text)]
        return answer

    def ask_again(self, show: Show) -> Comparison:
        """Put the last question once more, with the same seed and speculation the other way.

        Raises:
            InvalidRequest: when nothing was asked yet.
        """
        if self.last is None or self._asked is None:
            raise InvalidRequest("nothing was asked yet")
        before, options = self.last, self._asked.copy()
        chosen = speculation_of(options)
        options["speculation"] = dataclasses.replace(chosen, enabled=not before.speculated)
        options["seed"] = before.completion.seed
        answer = self._run(options, show)
        self._asked = options
        return compare(before, answer)

    def plain_speed(self) -> PlainSpeed | None:
        """The speed without guesses: of the answers here that had none, else as the cluster says.

        None when nobody has measured it yet.
        """
        seconds = sum(answer.stream_seconds for answer in self._plain)
        if seconds:
            tokens = sum(answer.stream_tokens for answer in self._plain)
            return PlainSpeed(tokens / seconds, "measured here")
        round_seconds = self.client.capabilities().plain_round_seconds
        return PlainSpeed(1 / round_seconds, "measured by the cluster") if round_seconds else None

    def reset(self) -> None:
        """Forget what was said; the statistics stay."""
        self.turns.clear()
        self._asked = None

    def _run(self, options: GenerateOptions, show: Show) -> Answer:
        times: list[float] = []
        num_first = 0
        self.trees.clear()
        began = time.perf_counter()
        with self.client.stream(**options) as stream:
            for event in stream:
                times.append(time.perf_counter())
                num_first = num_first or len(event.token_ids)
                if event.detail is not None:
                    self.trees.append(event.detail)
                show(event)
            completion = stream.completion
        seconds = time.perf_counter() - began
        self.statistics = self.statistics.add(completion, seconds)
        self.last = Answer(
            completion=completion,
            speculated=speculation_of(options).enabled,
            seconds=seconds,
            stream_tokens=len(completion.token_ids) - num_first,
            stream_seconds=times[-1] - times[0] if times else 0.0,
        )
        if not self.last.speculated and self.last.stream_tokens:
            self._plain.append(self.last)
        return self.last


def speculation_of(options: GenerateOptions) -> SpeculationOptions:
    """How the options speculate, whichever way it was said."""
    chosen = options.get("speculation", True)
    return chosen if isinstance(chosen, SpeculationOptions) else SpeculationOptions(enabled=chosen)


def compare(one: Answer, other: Answer) -> Comparison:
    """Two answers to one question, of which exactly one was speculated on, in either order."""
    left, right = one.completion.token_ids, other.completion.token_ids
    fast, plain = (one, other) if one.speculated else (other, one)
    return Comparison(
        identical=left == right,
        num_equal=_num_equal(left, right),
        ratio=fast.tokens_per_second / plain.tokens_per_second,
    )


def _num_equal(left: Sequence[int], right: Sequence[int]) -> int:
    for place, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return place
    return min(len(left), len(right))
