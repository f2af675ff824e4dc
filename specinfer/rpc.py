"""How every channel of specinfer is opened and how errors travel over gRPC.

Needs nothing but grpcio and protobuf, so that the SDK can use it; `server.py` is its counterpart
for the services. It knows nothing of what the calls mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from specinfer.errors import (
    InternalError,
    InvalidRequest,
    SpecinferError,
    Unavailable,
    error_class,
)
from specinfer.v1 import tree_pb2

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
ERROR_METADATA_KEY = "specinfer-error-bin"
MAX_ERROR_TEXT = 512
_BROKEN_CODES = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED)
# What a caller says of itself who goes on with a stream elsewhere when its router leaves.
RESUMES_KEY, RESUMES = "specinfer-resumes", "1"

# A server refuses pings that come faster than it permits (`too_many_pings` ends all streams of the
# connection), so both sides take their numbers from here.
KEEPALIVE_SECONDS = 30
_LIMITS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_LIMITS,
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # In spite of its name: how long one attempt to connect may take, its handshakes included.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A window that grows with the bandwidth takes in megabytes for an application that does not
    # read, and the server would never learn that it does not.
    ("grpc.http2.bdp_probe", 0),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_LIMITS,
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 500),
    ("grpc.http2.max_pings_without_data", 0),
    # Two servers on one port would share the calls between them; a port in use is an error.
    ("grpc.so_reuseport", 0),
)


@dataclass(frozen=True)
class TlsSettings:
    """Files of a TLS connection, in PEM.

    Attributes:
        ca: certificates to trust; None trusts the system's (client) or asks for no client
            certificate (server).
        certificate: our own certificate chain, or None.
        key: private key of `certificate`, or None.
        server_name: name that the server's certificate has to bear where it is not that of the
            address, or "".
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str = ""

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of a client; with a certificate and a key the connection is mutual."""
        return grpc.ssl_channel_credentials(
            _read(self.ca), _read(self.key), _read(self.certificate)
        )

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials of a server; with `ca` every client has to show a certificate."""
        key, certificate = _read(self.key), _read(self.certificate)
        if key is None or certificate is None:
            raise InvalidRequest("a TLS server needs a certificate and its key", field="tls")
        return grpc.ssl_server_credentials(
            [(key, certificate)], _read(self.ca), require_client_auth=self.ca is not None
        )


def open_channel(
    address: str,
    *,
    tls: TlsSettings | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
) -> grpc.aio.Channel:
    """An asyncio channel with our limits and keepalive. Connecting happens at the first call."""
    if tls is None:
        return grpc.aio.insecure_channel(
            address, options=CHANNEL_OPTIONS, interceptors=list(interceptors)
        )
    name = (("grpc.ssl_target_name_override", tls.server_name),) if tls.server_name else ()
    return grpc.aio.secure_channel(
        address,
        tls.channel_credentials(),
        options=(*CHANNEL_OPTIONS, *name),
        interceptors=list(interceptors),
    )


def error_metadata(error: SpecinferError) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata that carries an error's details."""
    return ((ERROR_METADATA_KEY, error_detail(error).SerializeToString()),)


def error_detail(error: SpecinferError) -> tree_pb2.ErrorDetail:
    """Message of an error's details, cut to what fits into metadata."""
    return tree_pb2.ErrorDetail(
        reason=error.reason,
        message=error_text(error),
        field=error.field[:MAX_ERROR_TEXT],
        retryable=error.retryable,
        retry_after=error.retry_after,
        request_id=error.request_id[:MAX_ERROR_TEXT],
    )


def hidden_fault() -> InternalError:
    """What callers see of a fault of ours, which whoever caught it has logged."""
    return InternalError("a fault inside the server; its log has the details")


def error_text(error: SpecinferError) -> str:
    """What an error says, cut to what fits beside the rest: metadata that is too large would turn
    the status itself into another one."""
    return error.message[:MAX_ERROR_TEXT]


def status_code(error: SpecinferError) -> grpc.StatusCode:
    """The gRPC status that an error travels as."""
    return grpc.StatusCode[error.code]


def error_from_rpc(error: grpc.RpcError) -> SpecinferError:
    """Our error for a failed call, with its details where the other side sent them."""
    code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None
    name = code.name if code is not None else "UNKNOWN"
    text = error.details() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else str(error)
    detail = _error_detail(error)
    return error_class("", name)(text or name) if detail is None else detailed_error(name, detail)


def detailed_error(code: str, detail: tree_pb2.ErrorDetail) -> SpecinferError:
    """Our error of what the other side sent of it: its status code's name, and the details."""
    retry_after = detail.retry_after if detail.HasField("retry_after") else None
    return error_class(detail.reason, code)(
        detail.message,
        field=detail.field,
        request_id=detail.request_id,
        retry_after=retry_after,
    )


def call_error(error: grpc.aio.AioRpcError) -> SpecinferError:
    """Our error of a user's failed call; a stream that was cut on the way is Unavailable."""
    found = error_from_rpc(error)
    code, text = error.code(), error.details() or ""
    # A router says why it cancels; a server that goes away under a call does not.
    unsaid = code is grpc.StatusCode.CANCELLED and _error_detail(error) is None
    cut = unsaid or (code in _BROKEN_CODES and "RST_STREAM" in text)
    return _cut(found) if cut else found


def shared_stream_error(error: grpc.aio.AioRpcError) -> SpecinferError:
    """As `call_error`, of a stream on which we may have been writing as it ended."""
    # grpc.aio puts an internal error in place of the status that a server ended it with, where a
    # message was on its way (grpc/grpc#36066).
    unsaid = error.code() in _BROKEN_CODES and _error_detail(error) is None
    return _cut(error_from_rpc(error)) if unsaid else call_error(error)


def _cut(error: SpecinferError) -> Unavailable:
    return Unavailable(f"the stream was cut: {error.message}")


def _error_detail(error: grpc.RpcError) -> tree_pb2.ErrorDetail | None:
    metadata: Any = getattr(error, "trailing_metadata", lambda: None)() or ()
    for key, value in metadata:
        if key == ERROR_METADATA_KEY:
            try:
                return tree_pb2.ErrorDetail.FromString(value)
            except DecodeError:
                return None
    return None


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", field="tls") from error
