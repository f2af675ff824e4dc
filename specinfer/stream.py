"""One call as an iterator of tokens, which outlives the connections that it runs over.

A stream that breaks before its first token is asked for again; one that breaks later is resumed at
its offset. This module knows nothing of channels, credentials or the wire.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple, Self

from specinfer.client_trace import ClientTrace
from specinfer.completion import Completion, CompletionBuilder
from specinfer.connection import CallLimits, Connection, EventCall
from specinfer.errors import InternalError, InvalidRequest, NotFound, SpecinferError
from specinfer.messages import (
    GenerateEvent,
    GenerateRequest,
    ResumeRequest,
    Started,
    TokensEvent,
)
from specinfer.retry import Attempts


class ResumeToken(NamedTuple):
    """Where to go on with a stream: `client.resume(*token)`, in this process or in another.

    Attributes:
        session_id: session of the stream.
        offset: tokens of the completion that were read.
    """

    session_id: str
    offset: int


class AsyncCompletionStream:
    """One call: an async iterator of TokensEvent, and a context manager that ends the call.

    Attributes:
        request_id: id of the request in logs and errors.
    """

    def __init__(
        self,
        connection: Connection,
        request: GenerateRequest | ResumeRequest,
        limits: CallLimits,
    ) -> None:
        self.request_id = request.request_id
        self._connection = connection
        self._request = request
        self._limits = limits
        self._attempts: Attempts | None = None
        self._call: EventCall | None = None
        self._builder = self._new_builder()
        self._trace = ClientTrace()
        self._break: SpecinferError | None = None
        # Whether the next call is the same request again, and whether there was one since the last
        # new token.
        self._anew = self._lost = False
        self._completion: Completion | None = None
        self._ended = False

    @property
    def started(self) -> Started | None:
        """The stream's first event with seed and session, or None before it came."""
        return self._builder.started

    @property
    def resume_token(self) -> ResumeToken | None:
        """Where to go on with the stream after what was read so far, or None before it started."""
        if isinstance(self._request, ResumeRequest):
            return ResumeToken(self._request.session_id, self._builder.offset)
        started = self._builder.started
        return None if started is None else ResumeToken(started.session_id, self._builder.offset)

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
        self._trace.end()
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
                self._trace.end(error=error)
                await self.close()
                error.request_id = error.request_id or self.request_id
                raise
            if event is not None:
                return event
        raise StopAsyncIteration

    async def _read(self) -> TokensEvent | None:
        """Read one event; None when it held no tokens, or the call is to be made again."""
        if self._attempts is None:
            self._attempts = self._connection.attempts(self._limits.timeout)
            self._trace.begin(self._request, self._connection.first_address)
        router: int | None = None
        try:
            if self._call is None:
                self._call = await self._connection.open_stream(
                    self._next_request(),
                    self._attempts,
                    self._limits.attempt_timeout,
                    self._trace.metadata,
                )
            router = self._call.router
            event = await self._call.read()
        except SpecinferError as error:
            await self._go_on_after(error, self._attempts, router)
            return None
        except asyncio.CancelledError:
            await self._cancelled()
            return None
        if event is None:
            self._finish()
            return None
        return self._take(event, self._attempts)

    def _next_request(self) -> GenerateRequest | ResumeRequest:
        token = self.resume_token
        if token is None or not self._builder.num_tokens:
            return self._request
        if self._anew:
            return self._same_request()
        return ResumeRequest(token.session_id, token.offset, self.request_id)

    def _take(self, event: GenerateEvent, attempts: Attempts) -> TokensEvent | None:
        new = self._builder.add(event)
        if isinstance(event, Started):
            self._trace.started(event)
            # From here on there is a session again that can be resumed, whatever is read of it.
            self._anew = False
        if new is None:
            return None
        attempts.progress()
        self._break = None
        self._lost = False
        return new

    def _same_request(self) -> GenerateRequest:
        """The request with the seed that was in use, which repeats its tokens."""
        started = self._builder.started
        assert isinstance(self._request, GenerateRequest)
        assert started is not None
        sampling = replace(self._request.sampling, seed=started.seed)
        return replace(self._request, sampling=sampling, random_seed=False)

    async def _go_on_after(
        self, error: SpecinferError, attempts: Attempts, router: int | None
    ) -> None:
        """Return when the rest is to be asked for; raises `error` when it is not."""
        self._call = None
        if self._builder.finished is not None:
            self._finish()
            return
        if self._regenerates(error):
            self._break = self._break or error
            self._anew = self._lost = True
            self._builder.repeated()
            self._trace.again(error, self._builder.num_tokens)
            return
        if isinstance(error, NotFound | InternalError) and self._break is not None:
            # What ended the stream says more than that it cannot be resumed.
            raise self._break from error
        self._break = self._break or (error if self._builder.num_tokens else None)
        await self._connection.again(error, attempts, router)
        self._trace.again(error, self._builder.num_tokens)
        if self._anew:
            self._builder.repeated()
        elif self._builder.num_tokens:
            self._builder.resumed()
        else:
            self._builder = self._new_builder()

    def _regenerates(self, error: SpecinferError) -> bool:
        """Whether the store has lost a session of ours, which can be made again once."""
        return (
            isinstance(error, NotFound)
            and isinstance(self._request, GenerateRequest)
            and self._builder.num_tokens > 0
            and not self._lost
            and self._connection.regenerates
        )

    def _new_builder(self) -> CompletionBuilder:
        request = self._request
        return CompletionBuilder(request.offset if isinstance(request, ResumeRequest) else 0)

    async def _cancelled(self) -> None:
        """A read ended by `close`, of the stream or the client, or by the caller's own task."""
        by_us = self._ended
        await self.close()
        self._connection.check_not_closed_meanwhile(self.request_id)
        task = asyncio.current_task()
        if not by_us or (task is not None and task.cancelling()):
            raise asyncio.CancelledError

    def _finish(self) -> None:
        self._ended = True
        self._call = None
        self._trace.end(self._builder.finished)
        self._completion = self._builder.build()
