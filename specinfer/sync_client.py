"""`Client`: the SDK without an event loop.

Every method hands its work to an `AsyncClient` that lives on a private event-loop thread and waits
for the answer. Nothing is decided here, so the two cannot drift apart.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc.aio

from specinfer.chat import ChatInput, ChatReply
from specinfer.client import DEFAULT_ADDRESS, AsyncClient
from specinfer.completion import Completion
from specinfer.credentials import TokenProvider
from specinfer.errors import ClientClosed
from specinfer.messages import Capabilities, RequestReport, Started, TokensEvent
from specinfer.options import ChatOptions, GenerateOptions, ResumeOptions
from specinfer.retry import RetryPolicy
from specinfer.rpc import TlsSettings
from specinfer.stream import AsyncCompletionStream, ResumeToken

_Result = TypeVar("_Result")


class LoopThread:
    """An event loop on a thread of its own, for callers that have none. Safe from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="specinfer-client", daemon=True
        )
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run `work` on the loop and wait; Ctrl-C cancels it. Raises ClientClosed."""
        with self._lock:
            if self._stopped:
                work.close()
                raise ClientClosed("this client was closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise ClientClosed("the client was closed during the call") from error
        except BaseException:
            future.cancel()
            raise

    def stop(self, last_work: Coroutine[Any, Any, None]) -> None:
        """Run `last_work`, cancel what is still under way, end the thread; again does nothing."""
        with self._lock:
            if self._stopped:
                last_work.close()
                return
            self._stopped = True
            future = asyncio.run_coroutine_threadsafe(_wind_up(last_work), self._loop)
        future.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _wind_up(last_work: Coroutine[Any, Any, None]) -> None:
    await last_work
    # Whoever waits for one of these tasks has to be woken before the loop ends.
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class Client:
    """A connection to a specinfer router, for code without an event loop. Safe from any thread.

        with Client("127.0.0.1:50051") as client:
            completion = client.generate("def add(a, b):", max_tokens=32, temperature=0)

    Methods, arguments and errors are those of AsyncClient.
    """

    def __init__(
        self,
        address: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        timeout: float | None = None,
        attempt_timeout: float | None = None,
        retry: RetryPolicy | None = None,
        tls: TlsSettings | None = None,
        api_key: str | None = None,
        token_provider: TokenProvider | None = None,
        allow_insecure_key: bool = False,
        interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
        multiplex: bool = True,
    ) -> None:
        """Take down where and how to connect.

        See AsyncClient for the arguments. `token_provider` and `interceptors` run on the client's
        own thread.
        """
        self._client = AsyncClient(
            address,
            timeout=timeout,
            attempt_timeout=attempt_timeout,
            retry=retry,
            tls=tls,
            api_key=api_key,
            token_provider=token_provider,
            allow_insecure_key=allow_insecure_key,
            interceptors=interceptors,
            multiplex=multiplex,
        )
        self.addresses = self._client.addresses
        self._loop = LoopThread()

    def __enter__(self) -> Self:
        self._client._connection.check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way and close the connection; closing again does nothing."""
        self._loop.stop(self._client.close())

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """Generate to the end. `prompt` is text to continue as it stands, without a chat template.

        See AsyncClient.generate.
        """
        return self._loop.run(self._client.generate(prompt, **options))

    def stream(
        self, prompt: str | None = None, **options: Unpack[GenerateOptions]
    ) -> CompletionStream:
        """Generate round by round; takes and raises what `generate` does.

        See AsyncClient.stream.
        """
        return CompletionStream(self._loop, self._client.stream(prompt, **options))

    def chat(self, messages: ChatInput, **options: Unpack[ChatOptions]) -> ChatReply:
        """Answer a question, the last turn of some messages, or a Conversation.

        See AsyncClient.chat.
        """
        return self._loop.run(self._client.chat(messages, **options))

    def resume(
        self, session_id: str, offset: int = 0, **options: Unpack[ResumeOptions]
    ) -> CompletionStream:
        """Go on with a stream, of this process or another, after its first `offset` tokens.

        See AsyncClient.resume.
        """
        return CompletionStream(self._loop, self._client.resume(session_id, offset, **options))

    def cancel(self, session_id: str) -> None:
        """End a session for good, whoever reads it; raises as `generate` does."""
        self._loop.run(self._client.cancel(session_id))

    def explain(self, request_id: str) -> RequestReport:
        """Say where a request's time went, by the id of the request or of its session.

        See AsyncClient.explain.
        """
        return self._loop.run(self._client.explain(request_id))

    def capabilities(self) -> Capabilities:
        """Say what this cluster accepts; raises as `generate` does."""
        return self._loop.run(self._client.capabilities())


class CompletionStream:
    """One call: an iterator of TokensEvent, and a context manager that ends the call.

    Attributes:
        request_id: id of the request in logs and errors.
    """

    def __init__(self, loop: LoopThread, stream: AsyncCompletionStream) -> None:
        self.request_id = stream.request_id
        self._loop = loop
        self._stream = stream

    @property
    def started(self) -> Started | None:
        """The stream's first event with seed and session, or None before it came."""
        return self._stream.started

    @property
    def resume_token(self) -> ResumeToken | None:
        """Where to go on with the stream after what was read so far, or None before it started."""
        return self._stream.resume_token

    @property
    def completion(self) -> Completion:
        """All of it, once the iteration has reached its end; raises InvalidRequest before."""
        return self._stream.completion

    def collect(self) -> Completion:
        """Read what is left and return all of it."""
        return self._loop.run(self._stream.collect())

    def close(self) -> None:
        """End the call; the server stops generating. Closing again does nothing."""
        try:
            self._loop.run(self._stream.close())
        except ClientClosed:
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TokensEvent:
        event = self._loop.run(_next_event(self._stream))
        if event is None:
            raise StopIteration
        return event


async def _next_event(stream: AsyncCompletionStream) -> TokensEvent | None:
    """The next event; StopAsyncIteration cannot leave a coroutine, so the end is None."""
    return await anext(stream, None)
