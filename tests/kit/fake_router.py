"""The SDK's fake router with scripts that make every event by themselves.

By default every request is answered by tokens that depend on its input and seed alone, in groups of
three when it may be speculated on.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from specinfer import testing
from specinfer.errors import SpecinferError
from specinfer.messages import (
    Capabilities,
    Finished,
    GenerateEvent,
    GenerateRequest,
    RoundFacts,
    SpeculationSummary,
    Started,
    TokenLogprob,
    TokensEvent,
    Usage,
)

VOCABULARY = 997
RANDOM_SEED = 4242
GROUP = 3

Script = Callable[[GenerateRequest, int], AsyncIterator[GenerateEvent]]


def capabilities(*, chat: bool = True) -> Capabilities:
    """What the fake says of itself."""
    return testing.fake_capabilities(vocab_size=VOCABULARY, max_model_len=512, chat=chat)


def fake_tokens(request: GenerateRequest, count: int) -> list[int]:
    """Tokens that depend on the input and, when sampled, on the seed."""
    sampling = request.sampling
    seed = 0 if sampling.greedy else (RANDOM_SEED if request.random_seed else sampling.seed + 1)
    text = f"{request.prompt}{request.token_ids}{request.messages}{seed}"
    state = zlib.crc32(text.encode())
    return [zlib.crc32(f"{state}/{index}".encode()) % VOCABULARY for index in range(count)]


def started_event(request: GenerateRequest) -> Started:
    """The first event of a request."""
    seed = RANDOM_SEED if request.random_seed else request.sampling.seed
    return Started(request.request_id, f"session-{request.request_id}", "fake", seed, 7)


def tokens_event(request: GenerateRequest, offset: int, token_ids: list[int]) -> TokensEvent:
    """The event of one round; each token reads as ` w` and its number."""
    logprobs: tuple[TokenLogprob, ...] = ()
    if request.num_logprobs is not None:
        logprobs = tuple(TokenLogprob(t, -0.5, ((t, -0.5), (t + 1, -1.5))) for t in token_ids)
    accepted = len(token_ids) - 1
    facts = RoundFacts(offset + 1, accepted, accepted, "", 0.001, 0.002, 0.0, 0.0005, 0.0001)
    text = "".join(f" w{token}" for token in token_ids)
    return TokensEvent(offset, text, tuple(token_ids), accepted, logprobs, facts)


def finished_event(num_tokens: int, num_rounds: int) -> Finished:
    """The last event of a request that reached its length."""
    accepted = num_tokens - num_rounds
    summary = SpeculationSummary(
        num_rounds, num_rounds, accepted, accepted, (accepted,) if accepted else (), ()
    )
    return Finished("length", "", Usage(7, num_tokens, 2), summary)


async def answer(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
    """The default script."""
    token_ids = fake_tokens(request, request.stop.max_tokens or 9)
    size = GROUP if request.speculation.enabled else 1
    yield started_event(request)
    starts = range(0, len(token_ids), size)
    for offset in starts:
        yield tokens_event(request, offset, token_ids[offset : offset + size])
    yield finished_event(len(token_ids), len(starts))


class FakeRouter(testing.FakeRouter):
    """The SDK's fake, with a script that makes every event by itself.

    Attributes:
        script: events for a request and the number of its call, from 1.
        failures: errors of the next calls for capabilities, in order.
    """

    def __init__(self, script: Script = answer, capabilities: Capabilities | None = None) -> None:
        super().__init__(capabilities=capabilities)
        self.script = script
        self.failures: list[SpecinferError] = []

    async def events(self, request: GenerateRequest) -> AsyncIterator[GenerateEvent]:
        calls = [one.request_id for one in self.requests].count(request.request_id)
        async for event in self.script(request, calls):
            yield event

    async def tell_capabilities(self) -> Capabilities:
        if self.failures:
            raise self.failures.pop(0)
        return self.capabilities or capabilities()


@contextmanager
def running(router: FakeRouter) -> Iterator[FakeRouter]:
    """Serve on a free port until the block ends."""
    with router:
        yield router
