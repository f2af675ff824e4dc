"""The SDK: `AsyncClient` turns arguments into calls of a router and their answers into plain data.

`Client` in `sync_client.py` is its twin for code without an event loop. Needs grpcio and protobuf
and nothing else. It knows nothing of models, tokenizers, workers or the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self, Unpack

import grpc.aio

from specinfer.chat import ChatInput, ChatReply, reply_of, turns_of
from specinfer.completion import Completion
from specinfer.connection import CallLimits, Connection, ConnectionOptions, check_addresses
from specinfer.credentials import Credentials, TokenProvider, check_plain_text
from specinfer.messages import Capabilities, RequestReport
from specinfer.options import (
    ChatOptions,
    GenerateOptions,
    ResumeOptions,
    build_request,
    build_resume,
    check_id,
    check_timeout,
)
from specinfer.retry import RetryPolicy
from specinfer.rpc import TlsSettings
from specinfer.stream import AsyncCompletionStream

DEFAULT_ADDRESS = "127.0.0.1:50051"


class AsyncClient:
    """A connection to a specinfer router, for asyncio.

        async with AsyncClient("127.0.0.1:50051") as client:
            completion = await client.generate("def add(a, b):", max_tokens=32, temperature=0)

    Nothing is sent before the first call. One client serves any number of calls at once, all from
    one event loop.
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

        Args:
            address: host and port of a router, or any gRPC target; or several, of routers that
                share a store: the next one is taken when one is unavailable, and streams go on
                there.
            timeout: seconds for each call with its retries; None waits as long as it takes.
            attempt_timeout: seconds that one attempt may be silent: until its answer comes, or of
                a stream until the first event and from each event to the next. Then the call is
                made again, or the stream resumed. None waits as long as the connection lives.
            retry: what to try again, and how; None takes RetryPolicy's defaults.
            tls: certificates; None speaks plain text.
            api_key: sent with each call.
            token_provider: gives the token to send with each call, as a plain or an async function;
                it is asked once more when a token is refused. Keep the token in it until it is
                about to expire.
            allow_insecure_key: send the key in plain text to other machines too.
            interceptors: of grpc.aio, for tracing and the like.
            multiplex: let streams that run at once share one gRPC call to their router, whose
                frames hold events of many: with many at once that takes half the work at both ends,
                and changes nothing of what they give or raise. With `interceptors`, which want to
                see each call, and with False each stream has a call of its own.

        Raises:
            InvalidRequest: when an argument is out of its range, or a key would travel to another
                machine in plain text.
        """
        self.addresses = check_addresses(address)
        credentials = Credentials(api_key, token_provider)
        if credentials.present and tls is None and not allow_insecure_key:
            check_plain_text(self.addresses)
        self._limits = CallLimits(
            check_timeout(timeout), check_timeout(attempt_timeout, "attempt_timeout")
        )
        self._connection = Connection(
            ConnectionOptions(
                self.addresses,
                retry or RetryPolicy(),
                tls,
                credentials,
                tuple(interceptors),
                multiplex=multiplex and not interceptors,
            )
        )

    async def __aenter__(self) -> Self:
        self._connection.check_open()
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
        await self._connection.close()

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

        The call starts at the first step of the iteration. A stream that breaks goes on where it
        broke, within the retry policy, each token once. Leaving it early, by `async with` or
        `close`, stops the generation; `resume` takes it up again while the store keeps it.
        """
        self._connection.check_open()
        limits = self._limits_of(options)
        return AsyncCompletionStream(self._connection, build_request(prompt, options), limits)

    async def chat(self, messages: ChatInput, **options: Unpack[ChatOptions]) -> ChatReply:
        """Answer a question, the last turn of some messages, or a Conversation.

        Args:
            messages: text of the user's, turns, or a Conversation.
            options: see ChatOptions.

        Raises what `generate` does, and InvalidRequest when the model has no chat template.
        """
        return reply_of(await self.generate(messages=turns_of(messages), **options))

    def resume(
        self, session_id: str, offset: int = 0, **options: Unpack[ResumeOptions]
    ) -> AsyncCompletionStream:
        """Go on with a stream, of this process or another, after its first `offset` tokens.

        Whoever reads the session at the moment loses it. The completion holds what comes from the
        offset on; its usage is that of the whole.

        Args:
            session_id: from `stream.resume_token`.
            offset: tokens of the completion that are there already.
            options: see ResumeOptions.

        Raises what `generate` does; NotFound when the store has forgotten the session.
        """
        self._connection.check_open()
        limits = self._limits_of(options)
        request = build_resume(session_id, offset, options)
        return AsyncCompletionStream(self._connection, request, limits)

    async def cancel(self, session_id: str) -> None:
        """End a session for good, whoever reads it; raises as `generate` does."""
        await self._connection.cancel(check_id("session_id", session_id), self._limits)

    async def explain(self, request_id: str) -> RequestReport:
        """Say where a request's time went, by the id of the request or of its session.

        Raises as `generate` does; NotFound when no router of `address` remembers the request.
        """
        return await self._connection.explain(check_id("request_id", request_id), self._limits)

    async def capabilities(self) -> Capabilities:
        """Say what this cluster accepts; raises as `generate` does."""
        return await self._connection.capabilities(self._limits)

    def _limits_of(self, options: GenerateOptions | ResumeOptions) -> CallLimits:
        silence = options.get("attempt_timeout", self._limits.attempt_timeout)
        return CallLimits(
            check_timeout(options.get("timeout", self._limits.timeout)),
            check_timeout(silence, "attempt_timeout"),
        )
