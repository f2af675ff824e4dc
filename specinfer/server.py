"""How every gRPC server of specinfer is built, announced and drained. Needs the `serve` extra.

A server here has bounded messages, health for each service, optional reflection, and one
interceptor that turns our errors into statuses. It knows nothing of what the calls mean.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from specinfer.credentials import is_loopback
from specinfer.errors import InternalError, InvalidRequest, SpecinferError
from specinfer.rpc import (
    SERVER_OPTIONS,
    TlsSettings,
    error_metadata,
    error_text,
    hidden_fault,
    status_code,
)
from specinfer.tasks import end_task
from specinfer.unix_sockets import claimed, socket_path

log = logging.getLogger(__name__)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
# Long enough for the answers that a failure gave to what was pending.
FAILED_GRACE_SECONDS = 1.0
READINESS_SECONDS = 1.0
# Three questions that whoever runs us asks the health service, and when each is answered SERVING.
# "" and the names of the services are answered as readiness is.
STARTUP = "startup"  # everything is loaded; it stays so
READINESS = "readiness"  # new work is taken: not while draining
LIVENESS = "liveness"  # the event loop answers and the engine has not failed; draining is life


@dataclass
class RpcServer:
    """A gRPC server with its health service.

    Attributes:
        server: the underlying server, to add servicers to before `start`.
        service_names: full names of the services, for health and reflection.
        port: where it listens; 0 for a unix socket.
    """

    server: grpc.aio.Server
    service_names: tuple[str, ...]
    health: health_aio.HealthServicer = field(default_factory=health_aio.HealthServicer)
    port: int = 0

    async def start(self) -> None:
        """Begin to serve and report every service as serving."""
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        await self.server.start()
        await self._report((STARTUP, LIVENESS), True)
        await self.set_serving(True)

    async def set_serving(self, serving: bool) -> None:
        """Report whether new work is taken, by the whole server and by each service."""
        await self._report(("", READINESS, *self.service_names), serving)

    async def set_failed(self) -> None:
        """Report that what is served is broken for good."""
        await self._report((LIVENESS,), False)

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new calls, let running ones finish for `grace_seconds`, then cut them off."""
        await self.set_serving(False)
        await self.server.stop(grace_seconds)

    async def _report(self, names: Sequence[str], serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in names:
            await self.health.set(name, status.SERVING if serving else status.NOT_SERVING)


@asynccontextmanager
async def reporting_readiness(
    server: RpcServer, is_ready: Callable[[], bool]
) -> AsyncIterator[None]:
    """Within the block the server's readiness follows `is_ready`, asked every second."""

    async def follow() -> None:
        while True:
            await asyncio.sleep(READINESS_SECONDS)
            await server.set_serving(is_ready())

    task = asyncio.create_task(follow())
    try:
        yield
    finally:
        await end_task(task)


def build_server(
    address: str,
    service_names: Sequence[str],
    *,
    tls: TlsSettings | None = None,
    insecure_bind: bool = False,
    enable_reflection: bool = True,
    max_concurrent_rpcs: int | None = None,
) -> RpcServer:
    """A server bound to `address` (port 0 takes a free one), with no servicer yet.

    `unix:/path` listens on a file for processes of the same user on this machine.

    Raises:
        InvalidRequest: when the port is in use, the address is none, or a plain-text server would
            be reachable from other machines and `insecure_bind` does not allow it.
    """
    if tls is None and not insecure_bind and not is_loopback(address):
        raise InvalidRequest(
            f"{address} can be reached from other machines without TLS; "
            "give certificates, bind to 127.0.0.1, or allow it with --insecure-bind",
            field="address",
        )
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor()],
        options=SERVER_OPTIONS,
        maximum_concurrent_rpcs=max_concurrent_rpcs,
    )
    if enable_reflection:
        reflection.enable_server_reflection((*service_names, reflection.SERVICE_NAME), server)
    built = RpcServer(server, tuple(service_names))
    built.port = _bind(server, address, tls)
    return built


def _bind(server: grpc.aio.Server, address: str, tls: TlsSettings | None) -> int:
    path = socket_path(address)
    try:
        with nullcontext() if path is None else claimed(path):
            if tls is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, tls.server_credentials())
            return port if path is None else 0
    except RuntimeError as error:
        raise InvalidRequest(
            f"cannot listen on {address}: the port is in use or the address is not ours",
            field="address",
        ) from error


async def serve_until_signal(
    server: RpcServer,
    *,
    grace_seconds: float,
    on_drain: Callable[[], Awaitable[None]] | None = None,
    failed: asyncio.Event | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the process's patience.

    Args:
        server: a started server.
        grace_seconds: how long running calls may take to finish.
        on_drain: awaited before calls are cut off.
        failed: set when what is served is broken for good; there is nothing to drain then.

    Raises:
        InternalError: after the end, when it was `failed` that ended it.
    """
    stop = asyncio.Event()
    failed = failed or asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    await _first_of(stop.wait(), failed.wait())
    stop.clear()
    log.info("draining")
    await server.set_serving(False)
    if failed.is_set():
        await server.set_failed()
        await server.drain(FAILED_GRACE_SECONDS)
        raise InternalError("the engine has failed; the log above says why")
    await _first_of(_drain(server, grace_seconds, on_drain), stop.wait())
    await server.server.stop(0)


async def _drain(
    server: RpcServer, grace_seconds: float, on_drain: Callable[[], Awaitable[None]] | None
) -> None:
    if on_drain is not None:
        await on_drain()
    await server.drain(grace_seconds)


async def _first_of(*work: Coroutine[Any, Any, object]) -> None:
    """Wait until one of them has ended; the others are cancelled."""
    tasks = [asyncio.ensure_future(one) for one in work]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()


def fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop: uvloop where it is installed, else None for Python's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call that raised one of our errors with its status; anything else is INTERNAL."""

    def __init__(self) -> None:
        # By method, and only of methods that a servicer has.
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[_Request, _Response] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[_Request, _Response] | None:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        if method not in self._wrapped:
            self._wrapped[method] = _wrap(handler, method)
        wrapped: grpc.RpcMethodHandler[_Request, _Response] = self._wrapped[method]
        return wrapped


def _wrap(
    handler: grpc.RpcMethodHandler[_Request, _Response], method: str
) -> grpc.RpcMethodHandler[_Request, _Response]:
    if handler.unary_unary is not None:
        return _rebuild(handler, unary_unary=_wrap_unary(handler.unary_unary, method))
    if handler.unary_stream is not None:
        return _rebuild(handler, unary_stream=_wrap_stream(handler.unary_stream, method))
    if handler.stream_stream is not None:
        return _rebuild(handler, stream_stream=_wrap_stream(handler.stream_stream, method))
    return handler


def _rebuild(
    handler: grpc.RpcMethodHandler[_Request, _Response], **behaviour: Any
) -> grpc.RpcMethodHandler[_Request, _Response]:
    makers: dict[str, Any] = {
        "unary_unary": grpc.unary_unary_rpc_method_handler,
        "unary_stream": grpc.unary_stream_rpc_method_handler,
        "stream_stream": grpc.stream_stream_rpc_method_handler,
    }
    ((kind, function),) = behaviour.items()
    rebuilt: grpc.RpcMethodHandler[_Request, _Response] = makers[kind](
        function, handler.request_deserializer, handler.response_serializer
    )
    return rebuilt


def _wrap_unary(behaviour: Any, method: str) -> Any:
    # The health service of grpcio-health-checking brings plain functions beside coroutines.
    async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            answer = behaviour(request, context)
            return await answer if inspect.isawaitable(answer) else answer
        except Exception as error:
            await _end(context, error, method)

    return unary


def _wrap_stream(behaviour: Any, method: str) -> Any:
    if not inspect.isasyncgenfunction(behaviour):
        return behaviour

    # Written here rather than yielded on: one generator less for every message to pass.
    async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    await context.write(response)
        except Exception as error:
            await _end(context, error, method)

    return stream


async def _end(
    context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str
) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, SpecinferError):
        log.error("call %s failed", method, exc_info=error)
        error = hidden_fault()
    await context.abort(status_code(error), error_text(error), error_metadata(error))
    raise error
