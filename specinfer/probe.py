"""Ask a gRPC server for its health: `python -m specinfer.probe HOST:PORT [--service NAME]`.

The health check of a container. It needs grpcio and nothing else: the two messages of the standard
health protocol (grpc.health.v1) are one field each, written and read here. Exit status 0 means
SERVING, 1 anything else, with the reason on stderr. It knows none of our services.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from specinfer.errors import SpecinferError
from specinfer.rpc import TlsSettings, error_from_rpc

METHOD = "/grpc.health.v1.Health/Check"
SERVING = b"\x08\x01"
_STATES = {b"": "UNKNOWN", b"\x08\x02": "NOT_SERVING", b"\x08\x03": "SERVICE_UNKNOWN"}
_MAX_NAME = 127


def health(address: str, service: str, tls: TlsSettings | None, timeout: float) -> str:
    """ "" when the server says that `service` is serving, else why not.

    Args:
        address: host and port of the server.
        service: name that its health service knows; "" is the server as a whole.
        tls: None for plain text.
        timeout: seconds to wait for the answer, connecting included.

    Raises:
        InvalidRequest: when a file of `tls` cannot be read.
    """
    name = service.encode()
    # HealthCheckRequest: string service = 1, its length in one byte.
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    channel = (
        grpc.insecure_channel(address)
        if tls is None
        else grpc.secure_channel(address, tls.channel_credentials(), _name_override(tls))
    )
    with channel:
        check: Callable[..., bytes] = channel.unary_unary(METHOD)
        try:
            answer = check(request, timeout=timeout)
        except grpc.RpcError as error:
            return f"{address}: {error_from_rpc(error).code}"
    return "" if answer == SERVING else f"{address}: {_STATES.get(answer, 'no health answer')}"


def _name_override(tls: TlsSettings) -> tuple[tuple[str, str], ...]:
    return (("grpc.ssl_target_name_override", tls.server_name),) if tls.server_name else ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the probe."""
    parser = argparse.ArgumentParser(prog="specinfer.probe", description="gRPC health check.")
    parser.add_argument("address", help="host and port of the server")
    parser.add_argument("--service", default="", help="startup, readiness, liveness or a service")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds to wait")
    parser.add_argument("--tls-ca", type=Path, help="certificates to trust, PEM; turns TLS on")
    parser.add_argument("--tls-certificate", type=Path, help="our certificate, PEM")
    parser.add_argument("--tls-key", type=Path, help="its private key, PEM")
    parser.add_argument("--tls-name", default="", help="name in the server's certificate")
    given = parser.parse_args(arguments)
    if len(given.service.encode()) > _MAX_NAME:
        parser.error(f"a service's name has at most {_MAX_NAME} bytes")
    tls = (
        TlsSettings(given.tls_ca, given.tls_certificate, given.tls_key, given.tls_name)
        if given.tls_ca
        else None
    )
    try:
        reason = health(given.address, given.service, tls, given.timeout)
    except SpecinferError as error:
        reason = error.message
    if reason:
        print(reason, file=sys.stderr)
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
