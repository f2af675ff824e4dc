"""Unix sockets as addresses: `unix:/run/specinfer/verify.sock`, for tiers of one machine.

The file's permissions say who may connect: it is born readable and writable for its owner alone. A
file that a dead process left is taken away; one that is listened on, or is no socket, never is.
This module knows nothing of gRPC.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specinfer.errors import InvalidRequest

SCHEME = "unix:"
# What the kernel has room for, without the byte that ends it.
MAX_PATH_BYTES = 107


def socket_path(address: str) -> Path | None:
    """The file of `unix:/path` or `unix:///path`; None for an address of another kind.

    Raises:
        InvalidRequest: the path is missing, not absolute, or longer than a socket's may be.
    """
    if not address.startswith(SCHEME):
        return None
    text = address.removeprefix(SCHEME)
    text = text.removeprefix("//") if text.startswith("///") else text
    if not text.startswith("/") or text.startswith("//"):
        raise InvalidRequest(
            f"{address!r} is no unix socket; one looks like unix:/run/specinfer/verify.sock",
            field="address",
        )
    if len(os.fsencode(text)) > MAX_PATH_BYTES:
        raise InvalidRequest(
            f"a unix socket's path has at most {MAX_PATH_BYTES} bytes, got {text!r}",
            field="address",
        )
    return Path(text)


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """A path that may be listened on within the block; the file made there is its owner's alone.

    The folder is made if it is missing, for its owner alone too.

    Raises:
        InvalidRequest: somebody listens there, what is there is no socket, or the folder cannot be
            used.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _clear(path)
    except OSError as error:
        raise InvalidRequest(
            f"cannot listen on {SCHEME}{path}: {error.strerror or error}", field="address"
        ) from error
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def _clear(path: Path) -> None:
    """Take a dead process's socket away."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise InvalidRequest(f"{path} is there and is no socket", field="address")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        failure = probe.connect_ex(str(path))
    # A full queue of connections is somebody's too.
    if failure in (0, errno.EAGAIN, errno.EINPROGRESS):
        raise InvalidRequest(f"{SCHEME}{path} is listened on already", field="address")
    if failure != errno.ECONNREFUSED:
        raise OSError(failure, os.strerror(failure))
    path.unlink()
