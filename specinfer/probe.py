"""Ask a gRPC server for its health: `python -m specinfer.probe ADDRESS [--service NAME]`.

The health check of a container. It runs every few seconds in each of them, so it must cost next to
nothing: it uses the standard library alone, and is run by its path, which imports no package. One
call of grpc.health.v1 is four frames of HTTP/2 (RFC 9113) with headers that are not compressed
(RFC 7541, 6.2.2). Exit status 0 means SERVING, 1 anything else, with the reason on stderr. It
knows none of our services.
"""

import argparse
import socket
import ssl
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PATH = b"/grpc.health.v1.Health/Check"
DATA, HEADERS, SETTINGS, GOAWAY = 0, 1, 4, 7
END_STREAM, END_HEADERS = 1, 4
MAX_FRAME = 16384
MAX_NAME = 100
_STATES = {
    b"": "UNKNOWN",
    b"\x08\x01": "SERVING",
    b"\x08\x02": "NOT_SERVING",
    b"\x08\x03": "SERVICE_UNKNOWN",
}


def health(address: str, service: str, timeout: float, tls: ssl.SSLContext | None = None) -> str:
    """What the server says of `service`: "SERVING" or another state of the health protocol.

    Args:
        address: host and port of the server, or unix: and the path of its socket.
        service: name that its health service knows; "" is the server as a whole.
        timeout: seconds to wait for a connection, and for each read.
        tls: None for plain text.

    Raises:
        OSError: no connection, no answer in time, or one that is not gRPC's.
    """
    host = address.rpartition(":")[0]
    plain = _connected(address, timeout)
    # Wrapping takes the socket over, and closes it if it fails.
    with tls.wrap_socket(plain, server_hostname=host) if tls else plain as connection:
        connection.sendall(_question(address, service, secure=tls is not None))
        answer = b""
        for kind, flags, stream, payload in _frames(connection):
            if kind == GOAWAY:
                raise OSError("the server ends the connection")
            if stream and kind == DATA:
                answer += payload
            if (stream and flags & END_STREAM) or len(answer) > MAX_FRAME:
                break
        # A call that fails has no message: NOT_FOUND is how an unknown service is told.
        return _STATES.get(answer[5:], "UNKNOWN") if answer else "SERVICE_UNKNOWN"


def _connected(address: str, timeout: float) -> socket.socket:
    if not address.startswith("unix:"):
        host, _, port = address.rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), timeout)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout)
    try:
        connection.connect(address.removeprefix("unix:"))
    except OSError:
        connection.close()
        raise
    return connection


def _question(address: str, service: str, *, secure: bool) -> bytes:
    name = service.encode()
    # HealthCheckRequest: string service = 1; before it gRPC's own five bytes.
    message = b"\x0a" + bytes([len(name)]) + name if name else b""
    headers = b"\x83" + (b"\x87" if secure else b"\x86")  # POST, and the scheme
    headers += b"\x04" + _text(PATH) + b"\x01" + _text(address.encode())
    headers += (
        b"\x0f\x10" + _text(b"application/grpc") + b"\x00" + _text(b"te") + _text(b"trailers")
    )
    return b"".join(
        (
            PREFACE,
            _frame(SETTINGS, 0, 0, b""),
            _frame(HEADERS, END_HEADERS, 1, headers),
            _frame(DATA, END_STREAM, 1, struct.pack(">BI", 0, len(message)) + message),
        )
    )


def _text(value: bytes) -> bytes:
    return bytes([len(value)]) + value


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _frames(connection: socket.socket) -> Iterator[tuple[int, int, int, bytes]]:
    while True:
        head = _read(connection, 9)
        length = int.from_bytes(head[:3], "big")
        if length > MAX_FRAME:
            raise OSError("what answers does not speak HTTP/2")
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        yield kind, flags, stream & 0x7FFFFFFF, _read(connection, length)


def _read(connection: socket.socket, number: int) -> bytes:
    data = b""
    while len(data) < number:
        more = connection.recv(number - len(data))
        if not more:
            raise OSError("the server closed the connection")
        data += more
    return data


def _tls(ca: Path, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2"])
    # It asks the process beside it, by an address that no certificate bears.
    context.check_hostname = False
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the probe."""
    parser = argparse.ArgumentParser(prog="specinfer.probe", description="gRPC health check.")
    parser.add_argument("address", help="host and port of the server, or unix:/path")
    parser.add_argument("--service", default="", help="startup, readiness, liveness or a service")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds to wait")
    parser.add_argument("--tls-ca", type=Path, help="certificates to trust, PEM; turns TLS on")
    parser.add_argument("--tls-certificate", type=Path, help="our certificate, PEM")
    parser.add_argument("--tls-key", type=Path, help="its private key, PEM")
    given = parser.parse_args(arguments)
    if len(given.service.encode()) > MAX_NAME:
        parser.error(f"a service's name has at most {MAX_NAME} bytes")
    try:
        tls = _tls(given.tls_ca, given.tls_certificate, given.tls_key) if given.tls_ca else None
        state = health(given.address, given.service, given.timeout, tls)
    except (OSError, ValueError) as error:
        state = str(error)
    if state != "SERVING":
        print(f"{given.address}: {state}", file=sys.stderr)
    return 0 if state == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
