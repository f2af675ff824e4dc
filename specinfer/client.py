"""The SDK: `AsyncClient` turns arguments into one gRPC stream and its events into tokens and text.

`Client` in `sync_client.py` is its twin for code without an event loop. Needs grpcio and protobuf
and nothing else. It knows nothing of models, tokenizers or workers.
"""

from __future__ import annotations

import asyncio
import random
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from specinfer.completion import Completion, CompletionBuilder
from specinfer.convert import capabilities_from_wire, event_from_wire, request_to_wire
from specinfer.errors import ClientClosed, InvalidRequest, SpecinferError
from specinfer.messages import Capabilities, GenerateRequest, Started, TokensEvent
from specinfer.options import GenerateOptions, build_request, check_timeout
from specinfer.retry import Attempts, RetryPolicy
from specinfer.rpc import TlsSettings, error_from_rpc, open_channel
from specinfer.v1 import router_pb2, router_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"

_Metadata = tuple[tuple[str, str], ...]


class AsyncClient:
    """A connection to a specinfer router, for asyncio.

        async with AsyncClient("127.0.0.1:50051") as client:
            completion = await client.generate("def add(a, b):", max_tokens=32, temperature=0)

    Nothing is sent before the first call. One client serves any number of calls at once, all from
    one event loop.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        tls: TlsSettings | None = None,
    ) -> None:
        """Take down where and how to connect.

        Args:
            address: host and port of a router, or any gRPC target.
            timeout: seconds for each call with its retries; None waits as long as it takes.
            retry: what to try again before the first token; None takes RetryPolicy's defaults.
            tls: certificates; None speaks plain text.

        Raises:
            InvalidRequest: when an argument is out of its range.
        """
        if not isinstance(address, str) or not address:
            raise InvalidRequest(f"address is host:port, got {address!r}", field="address")
        self.address = address
        self._timeout = check_timeout(timeout)
        self._retry = RetryPolicy() if retry is None else retry
        self._tls = tls
        self._chance = random.Random()
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        self._check_open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is under way and close the connection; closing again does nothing."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)

    async def generate(
        self, prompt: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """Generate to the end. `prompt` is text to continue as it stands, without a chat template.

        Args:
            prompt: text to continue; or leave it out and give `messages` or `token_ids`.
            options: see GenerateOptions.

        Raises:
            InvalidRequest: when an argument is at fault; nothing was sent if it can be seen here.
            Unavailable, ResourceExhausted, DeadlineExceeded, NotFound, ...: see specinfer.errors;
                each carries `request_id` and `retryable`.
            ClientClosed: after `close`.
        """
        async with self.stream(prompt, **options) as stream:
            return await stream.collect()

    def stream(
        self, prompt: str | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncCompletionStream:
        """Generate round by round; takes and raises what `generate` does.

        The call starts at the first step of the iteration. Leaving the stream early, by `async
        with` or `close`, cancels it on the server.
        """
        self._check_open()
        timeout = check_timeout(options.get("timeout", self._timeout))
        return AsyncCompletionStream(self, build_request(prompt, options), timeout)

    async def capabilities(self) -> Capabilities:
        """What this cluster accepts. Raises as `generate` does."""
        attempts = self._attempts(self._timeout)
        while True:
            try:
                wire = await self._stub().GetCapabilities(
                    router_pb2.GetCapabilitiesRequest(),
                    timeout=attempts.remaining(),
                    metadata=_metadata("", attempts.number),
                )
                return capabilities_from_wire(wire)
            except grpc.aio.AioRpcError as error:
                await attempts.wait_or_raise(error_from_rpc(error))
            except asyncio.CancelledError:
                self._check_not_closed_meanwhile("")
                raise

    def _attempts(self, timeout: float | None) -> Attempts:
        return Attempts(self._retry, timeout, self._chance)

    def _stub(self) -> router_pb2_grpc.GenerationServiceAsyncStub:
        self._check_open()
        if self._channel is None:
            self._channel = open_channel(self.address, tls=self._tls)
        return router_pb2_grpc.GenerationServiceStub(self._channel)

    def _check_open(self) -> None:
        if self._closed:
            raise ClientClosed("this client was closed")

    def _check_not_closed_meanwhile(self, request_id: str) -> None:
        # gRPC reports a closed channel as a cancelled task; only a cancelled task is one.
        task = asyncio.current_task()
        if self._closed and (task is None or not task.cancelling()):
            raise ClientClosed(
                "the client was closed during the call", request_id=request_id
            ) from None


class AsyncCompletionStream:
    """One call: an async iterator of TokensEvent, and a context manager that ends the call.

    Attributes:
        request_id: id of the request in logs and errors.
    """

    def __init__(
        self, client: AsyncClient, request: GenerateRequest, timeout: float | None
    ) -> None:
        self.request_id = request.request_id
        self._client = client
        self._wire = request_to_wire(request)
        self._timeout = timeout
        self._attempts: Attempts | None = None
        self._call: grpc.aio.UnaryStreamCall[Any, router_pb2.GenerateResponse] | None = None
        self._builder = CompletionBuilder()
        self._completion: Completion | None = None
        self._ended = False

    @property
    def started(self) -> Started | None:
        """The stream's first event with seed and session, or None before it came."""
        return self._builder.started

    @property
    def completion(self) -> Completion:
        """All of it, once the iteration has reached its end; raises InvalidRequest before."""
        if self._completion is None:
            raise InvalidRequest("the stream has not reached its end", field="completion")
        return self._completion

    async def collect(self) -> Completion:
        """Read what is left and return all of it."""
        async for _ in self:
            pass
        return self.completion

    async def close(self) -> None:
        """End the call; the server stops generating. Closing again does nothing."""
        self._ended = True
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokensEvent:
        while not self._ended:
            try:
                event = await self._read()
            except SpecinferError as error:
                self._ended = True
                error.request_id = error.request_id or self.request_id
                raise
            if event is not None:
                return event
        raise StopAsyncIteration

    async def _read(self) -> TokensEvent | None:
        """Read one message; None when it held no tokens, or the call is to be made again."""
        if self._attempts is None:
            self._attempts = self._client._attempts(self._timeout)
        try:
            if self._call is None:
                self._call = self._open(self._attempts)
            wire = await self._call.read()
        except grpc.aio.AioRpcError as error:
            self._call = None
            await self._try_again(error_from_rpc(error), self._attempts)
            return None
        except asyncio.CancelledError:
            await self._cancelled()
            return None
        if not isinstance(wire, router_pb2.GenerateResponse):
            self._finish()
            return None
        event = event_from_wire(wire)
        self._builder.add(event)
        return event if isinstance(event, TokensEvent) else None

    def _open(
        self, attempts: Attempts
    ) -> grpc.aio.UnaryStreamCall[Any, router_pb2.GenerateResponse]:
        return self._client._stub().Generate(
            self._wire,
            timeout=attempts.remaining(),
            metadata=_metadata(self.request_id, attempts.number),
        )

    async def _try_again(self, error: SpecinferError, attempts: Attempts) -> None:
        if self._builder.finished is not None:
            self._finish()
            return
        if self._builder.num_events:
            raise error
        await attempts.wait_or_raise(error)
        self._builder = CompletionBuilder()

    async def _cancelled(self) -> None:
        """A read ended by `close`, of the stream or the client, or by the caller's own task."""
        by_us = self._ended
        await self.close()
        self._client._check_not_closed_meanwhile(self.request_id)
        task = asyncio.current_task()
        if not by_us or (task is not None and task.cancelling()):
            raise asyncio.CancelledError

    def _finish(self) -> None:
        self._ended = True
        self._call = None
        self._completion = self._builder.build()


def _metadata(request_id: str, attempt: int) -> _Metadata:
    """The attempt number lets a server see retries; the id joins its log lines."""
    identity = (("x-request-id", request_id),) if request_id else ()
    return (*identity, ("x-attempt", str(attempt)))
