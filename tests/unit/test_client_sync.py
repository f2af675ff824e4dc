"""Client does what AsyncClient does, without an event loop and from any thread."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from specinfer import (
    AsyncClient,
    AsyncCompletionStream,
    Client,
    ClientClosed,
    CompletionStream,
    InvalidRequest,
    NotFound,
)
from specinfer.messages import GenerateEvent, GenerateRequest
from tests.kit.fake_router import FakeRouter, fake_tokens, running, started_event, tokens_event

TWIN_NAMES = {
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
}


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with running(FakeRouter()) as started:
        yield started


@pytest.fixture
def client(router: FakeRouter) -> Iterator[Client]:
    with Client(router.address, timeout=20) as opened:
        yield opened


async def endless(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
    yield started_event(request)
    yield tokens_event(request, 0, [1])
    await asyncio.Event().wait()


def members(kind: type) -> dict[str, tuple[str, str]]:
    """Arguments and first line of the documentation of all public and protocol members."""
    protocol = {*TWIN_NAMES, *TWIN_NAMES.values()}
    return {
        TWIN_NAMES.get(name, name): (
            arguments(member),
            (inspect.getdoc(member) or "").partition("\n")[0],
        )
        for name, member in vars(kind).items()
        if name == "__init__" or not name.startswith("_") or name in protocol
    }


def first_line(member: object) -> str:
    return (inspect.getdoc(member) or "").partition("\n")[0]


def arguments(member: object) -> str:
    if not callable(member):
        return type(member).__name__
    parameters = inspect.signature(member).parameters.values()
    return ", ".join(str(parameter) for parameter in parameters)


def test_the_twins_have_the_same_members_arguments_and_documentation() -> None:
    assert members(AsyncClient) == members(Client)
    one, other = members(AsyncCompletionStream), members(CompletionStream)
    # Users make clients, and clients make streams.
    del one["__init__"], other["__init__"]
    assert one == other
    assert {"generate", "stream", "chat", "resume", "cancel", "explain"} < members(Client).keys()


def test_generate_and_stream(client: Client, router: FakeRouter) -> None:
    completion = client.generate("hello", max_tokens=7, temperature=0)
    assert list(completion.token_ids) == fake_tokens(router.requests[0], 7)
    with client.stream("hello", max_tokens=7, temperature=0) as stream:
        events = list(stream)
    assert [len(event.token_ids) for event in events] == [3, 3, 1]
    assert stream.completion.token_ids == completion.token_ids
    assert stream.started is not None
    assert client.stream("hello", max_tokens=7, temperature=0).collect().text == completion.text
    assert client.capabilities().vocab_size == 997


def test_errors_are_the_same(client: Client, router: FakeRouter) -> None:
    async def refuse(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        raise NotFound("no such model")
        yield started_event(request)

    router.script = refuse
    with pytest.raises(NotFound) as caught:
        client.generate("hello", request_id="r-1")
    assert caught.value.request_id == "r-1"
    with pytest.raises(InvalidRequest):
        client.stream("")


def test_leaving_a_stream_early_cancels_it_on_the_server(
    client: Client, router: FakeRouter
) -> None:
    router.script = endless
    with client.stream("hello") as stream:
        next(iter(stream))
    assert router.cancelled.wait(10)
    assert list(stream) == []


def test_many_threads_share_a_client(client: Client, router: FakeRouter) -> None:
    prompts = [f"prompt {index}" for index in range(24)]
    with ThreadPoolExecutor(8) as pool:
        completions = list(pool.map(lambda p: client.generate(p, temperature=0), prompts))
    by_prompt = {request.prompt: fake_tokens(request, 9) for request in router.requests}
    assert [list(c.token_ids) for c in completions] == [by_prompt[p] for p in prompts]


def test_a_closed_client_refuses(router: FakeRouter) -> None:
    client = Client(router.address)
    waiting = client.stream("hello")
    client.close()
    client.close()
    with pytest.raises(ClientClosed):
        client.generate("hello")
    with pytest.raises(ClientClosed):
        client.stream("hello")
    with pytest.raises(ClientClosed):
        next(waiting)
    with pytest.raises(ClientClosed), client:
        pass
    waiting.close()


def test_closing_wakes_those_who_wait(router: FakeRouter) -> None:
    router.script = endless
    client = Client(router.address)
    stream = client.stream("hello")
    next(stream)
    reading = threading.Event()

    def read() -> str:
        reading.set()
        try:
            next(stream)
        except ClientClosed:
            return "closed"
        return "an event"

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(read)
        reading.wait()
        client.close()
        assert answer.result(10) == "closed"
    assert router.cancelled.wait(10)


def test_a_stream_left_by_a_break_stops_the_generation(client: Client, router: FakeRouter) -> None:
    router.script = endless
    for _ in client.stream("hello"):
        break
    assert router.cancelled.wait(10)


def test_a_stream_may_be_forgotten_after_its_client(router: FakeRouter) -> None:
    router.script = endless
    client = Client(router.address)
    stream = client.stream("hello")
    next(stream)
    client.close()
    # An error in a finalizer is a warning, and those fail here.
    del stream
    assert router.cancelled.wait(10)


def test_a_forgotten_client_does_not_keep_the_process(router: FakeRouter) -> None:
    code = (
        "from specinfer import Client\n"
        f"client = Client({router.address!r})\n"
        "stream = client.stream('hello', max_tokens=9)\n"
        "print(next(stream).token_ids)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
