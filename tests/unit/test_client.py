"""AsyncClient against a scripted router: streaming, retries, errors, deadlines, cancelling."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest

from specinfer import (
    AsyncClient,
    ChatMessage,
    ClientClosed,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    RetryPolicy,
    SpecinferError,
    SpeculationOptions,
    Unavailable,
)
from specinfer.messages import GenerateEvent, GenerateRequest
from tests.kit.fake_router import (
    FakeRouter,
    Script,
    answer,
    fake_tokens,
    finished_event,
    running,
    started_event,
    tokens_event,
)

pytestmark = pytest.mark.usefixtures("both_kinds_of_call")

FAST = RetryPolicy(max_attempts=3, initial_backoff=0.001, max_backoff=0.01)


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with running(FakeRouter()) as started:
        yield started


@pytest.fixture
async def client(router: FakeRouter) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(router.address, timeout=20, retry=FAST) as opened:
        yield opened


def failing(error: SpecinferError, num_failures: int, *, num_tokens: int = 0) -> Script:
    """A script whose first calls end with `error`, after `num_tokens` tokens."""

    async def script(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        if attempt <= num_failures:
            yield started_event(request)
            for index in range(num_tokens):
                yield tokens_event(request, index, [index])
            raise error
        async for event in answer(request, attempt):
            yield event

    return script


async def test_generate_gathers_the_whole_stream(client: AsyncClient, router: FakeRouter) -> None:
    completion = await client.generate("hello", max_tokens=8, seed=3, request_id="r-1", logprobs=2)
    tokens = fake_tokens(router.requests[0], 8)
    assert completion.token_ids == tuple(tokens)
    assert completion.text == "".join(f" w{token}" for token in tokens)
    assert completion.finish_reason == "length"
    assert (completion.seed, completion.request_id, completion.model) == (3, "r-1", "fake")
    assert [entry.token_id for entry in completion.logprobs] == tokens
    assert len(completion.rounds) == 3
    assert completion.speculation.num_accepted_tokens == 5
    assert completion.usage.num_completion_tokens == 8


async def test_every_argument_reaches_the_router(client: AsyncClient, router: FakeRouter) -> None:
    await client.generate(
        messages=[{"role": "user", "content": "hi"}, ChatMessage("assistant", "ho")],
        model="fake",
        max_tokens=5,
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={5: -1.0},
        seed=9,
        stop="END",
        stop_token_ids=[8],
        ignore_eos=True,
        logprobs=0,
        speculation=SpeculationOptions(max_nodes=4, max_depth=2, widths=(2, 1)),
    )
    request = router.requests[0]
    assert request.messages == (ChatMessage("user", "hi"), ChatMessage("assistant", "ho"))
    assert (request.prompt, request.token_ids, request.model) == (None, None, "fake")
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 40, 0.9)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.01, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.2, 0.3)
    assert dict(sampling.logit_bias) == {5: -1.0}
    assert (sampling.seed, request.random_seed) == (9, False)
    assert (request.stop.max_tokens, request.stop.stop) == (5, ("END",))
    assert (request.stop.stop_token_ids, request.stop.ignore_eos) == ((8,), True)
    assert request.num_logprobs == 0
    assert request.speculation == SpeculationOptions(True, 4, 2, (2, 1))


async def test_without_a_seed_the_router_chooses(client: AsyncClient, router: FakeRouter) -> None:
    completion = await client.generate(token_ids=[1, 2, 3], speculation=False)
    assert router.requests[0].random_seed
    assert router.requests[0].token_ids == (1, 2, 3)
    assert not router.requests[0].speculation.enabled
    assert completion.seed == 4242
    assert len(completion.request_id) == 32
    assert router.metadata[0]["x-request-id"] == completion.request_id


async def test_a_stream_gives_rounds_and_then_the_completion(client: AsyncClient) -> None:
    stream = client.stream("hello", max_tokens=7)
    assert stream.started is None
    async with stream:
        with pytest.raises(InvalidRequest, match="not reached its end"):
            _ = stream.completion
        events = [event async for event in stream]
    assert [event.num_accepted_tokens for event in events] == [2, 2, 0]
    assert [event.offset for event in events] == [0, 3, 6]
    assert stream.started is not None
    assert stream.completion.text == "".join(event.text for event in events)
    assert [event async for event in stream] == []


async def test_a_stream_left_by_a_break_stops_the_generation(
    client: AsyncClient, router: FakeRouter
) -> None:
    async def endless(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        yield started_event(request)
        yield tokens_event(request, 0, [1])
        await asyncio.Event().wait()

    router.script = endless
    async for _ in client.stream("hello"):
        break
    assert await asyncio.to_thread(router.cancelled.wait, 10)


async def test_leaving_a_stream_early_cancels_it_on_the_server(
    client: AsyncClient, router: FakeRouter
) -> None:
    async def endless(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        yield started_event(request)
        yield tokens_event(request, 0, [1])
        await asyncio.Event().wait()

    router.script = endless
    async with client.stream("hello") as stream:
        async for _ in stream:
            break
    assert await asyncio.to_thread(router.cancelled.wait, 10)
    await stream.close()
    assert [event async for event in stream] == []


async def test_cancelling_the_task_cancels_the_call(
    client: AsyncClient, router: FakeRouter
) -> None:
    seen = asyncio.Event()

    async def endless(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        yield started_event(request)
        yield tokens_event(request, 0, [1])
        await asyncio.Event().wait()

    async def read() -> None:
        async for _ in client.stream("hello"):
            seen.set()

    router.script = endless
    task = asyncio.create_task(read())
    await seen.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(router.cancelled.wait, 10)


@pytest.mark.parametrize(
    "error", [Unavailable("gone"), ResourceExhausted("full", retry_after=0.01)]
)
async def test_a_retryable_error_is_retried_before_the_first_token(
    client: AsyncClient, router: FakeRouter, error: SpecinferError
) -> None:
    router.script = failing(error, 2)
    completion = await client.generate("hello", max_tokens=4)
    assert len(completion.token_ids) == 4
    assert len(router.requests) == 3
    assert len({entry["x-request-id"] for entry in router.metadata}) == 1


async def test_attempts_run_out(client: AsyncClient, router: FakeRouter) -> None:
    router.script = failing(Unavailable("gone"), 9)
    with pytest.raises(Unavailable, match="gone") as caught:
        await client.generate("hello", request_id="r-2")
    assert caught.value.request_id == "r-2"
    assert caught.value.retryable
    assert len(router.requests) == FAST.max_attempts


async def test_a_stream_that_cannot_be_resumed_is_not_begun_again_unless_it_may_be(
    router: FakeRouter,
) -> None:
    router.script = failing(Unavailable("gone"), 1, num_tokens=1)
    async with AsyncClient(router.address, retry=replace(FAST, regenerate=False)) as client:
        stream = client.stream("hello")
        first = await anext(stream)
        assert first.token_ids == (0,)
        with pytest.raises(Unavailable) as caught:
            await anext(stream)
    assert caught.value.request_id == stream.request_id
    assert isinstance(caught.value.__cause__, NotFound)
    assert len(router.requests) == len(router.resumed) == 1
    assert stream.resume_token == (f"session-{stream.request_id}", 1)
    assert [event async for event in stream] == []


@pytest.mark.parametrize(
    "error",
    [
        ResourceExhausted("full, no hint"),
        NotFound("no such model"),
        InvalidRequest("too long", field="prompt"),
        InternalError("a fault"),
    ],
)
async def test_other_errors_are_not_retried(
    client: AsyncClient, router: FakeRouter, error: SpecinferError
) -> None:
    router.script = failing(error, 9)
    with pytest.raises(type(error)) as caught:
        await client.generate("hello", request_id="r-3")
    assert (caught.value.message, caught.value.field) == (error.message, error.field)
    assert caught.value.request_id == "r-3"
    assert len(router.requests) == 1


async def test_a_deadline_ends_a_call(router: FakeRouter) -> None:
    async def silent(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        yield started_event(request)
        await asyncio.Event().wait()

    router.script = silent
    async with AsyncClient(router.address, timeout=60) as client:
        with pytest.raises(DeadlineExceeded) as caught:
            await client.generate("hello", timeout=0.5, request_id="r-4")
    assert caught.value.request_id == "r-4"
    assert await asyncio.to_thread(router.cancelled.wait, 10)


async def test_retries_respect_the_deadline(router: FakeRouter) -> None:
    router.script = failing(ResourceExhausted("full", retry_after=60), 9)
    async with AsyncClient(router.address, timeout=5) as client:
        began = time.monotonic()
        with pytest.raises(ResourceExhausted) as caught:
            await client.generate("hello")
    assert time.monotonic() - began < 4
    assert caught.value.retry_after == 60
    assert len(router.requests) == 1


async def test_nobody_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        async with AsyncClient(address, timeout=20, retry=FAST) as client:
            with pytest.raises(Unavailable) as caught:
                await client.generate("hello", request_id="r-5")
            with pytest.raises(Unavailable):
                await client.capabilities()
    assert caught.value.request_id == "r-5"


async def test_a_stream_without_its_last_event_is_an_error(
    client: AsyncClient, router: FakeRouter
) -> None:
    async def cut(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        yield started_event(request)
        yield tokens_event(request, 0, [1])

    router.script = cut
    with pytest.raises(InternalError, match="without its last event"):
        await client.generate("hello")


async def test_events_out_of_order_are_an_error(client: AsyncClient, router: FakeRouter) -> None:
    async def unannounced(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        yield tokens_event(request, 0, [1])

    async def endless(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        yield started_event(request)
        yield finished_event(0, 0)
        yield tokens_event(request, 0, [1])

    router.script = unannounced
    with pytest.raises(InternalError, match="first event"):
        await client.generate("hello")
    router.script = endless
    # On a shared stream nothing of a call comes after its last event.
    async with AsyncClient(router.address, retry=FAST, multiplex=False) as client:
        with pytest.raises(InternalError, match="after the last"):
            await client.generate("hello")


async def test_capabilities_are_retried(client: AsyncClient, router: FakeRouter) -> None:
    router.failures = [Unavailable("starting"), Unavailable("starting")]
    assert (await client.capabilities()).model == "fake"
    router.failures = [NotFound("never")]
    with pytest.raises(NotFound):
        await client.capabilities()


async def test_a_closed_client_refuses(router: FakeRouter) -> None:
    client = AsyncClient(router.address)
    waiting = client.stream("hello")
    await client.close()
    await client.close()
    with pytest.raises(ClientClosed):
        await anext(waiting)
    with pytest.raises(ClientClosed):
        await client.generate("hello")
    with pytest.raises(ClientClosed):
        await client.capabilities()
    with pytest.raises(ClientClosed):
        await client.__aenter__()
    assert not router.requests


async def test_closing_the_client_ends_what_is_under_way(router: FakeRouter) -> None:
    async def endless(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        yield started_event(request)
        yield tokens_event(request, 0, [1])
        await asyncio.Event().wait()

    router.script = endless
    client = AsyncClient(router.address)
    stream = client.stream("hello")
    await anext(stream)
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(ClientClosed):
        await reading
    assert await asyncio.to_thread(router.cancelled.wait, 10)


async def test_many_calls_share_a_client(client: AsyncClient, router: FakeRouter) -> None:
    prompts = [f"prompt {index}" for index in range(40)]
    completions = await asyncio.gather(*(client.generate(p, temperature=0) for p in prompts))
    by_prompt = {request.prompt: fake_tokens(request, 9) for request in router.requests}
    assert [list(c.token_ids) for c in completions] == [by_prompt[p] for p in prompts]


def test_waits_grow_and_are_bounded() -> None:
    policy = RetryPolicy(max_attempts=6, initial_backoff=1, multiplier=2, max_backoff=5, jitter=0)
    chance = random.Random(0)
    gone = Unavailable("gone")
    assert [policy.wait_after(n, gone, chance) for n in range(1, 6)] == [1, 2, 4, 5, 5]
    assert policy.wait_after(6, gone, chance) is None
    assert policy.wait_after(1, ResourceExhausted("full", retry_after=9), chance) == 9
    jittered = RetryPolicy(initial_backoff=1, jitter=0.2)
    waits = [jittered.wait_after(1, gone, chance) or 0 for _ in range(100)]
    assert min(waits) < 0.9
    assert max(waits) > 1.1
    assert all(0.8 <= wait <= 1.2 for wait in waits)
    with pytest.raises(InvalidRequest, match="max_attempts"):
        RetryPolicy(max_attempts=0)
