"""The Redis of a cluster under test: flags, readiness, and the harm that is done to its data.

This module knows nothing of what is kept there.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import redis.asyncio
from redis.exceptions import RedisError

from specinfer.errors import SpecinferError, Unavailable

Check = Callable[[], Awaitable[bool]]
AOF_FOLDER = "appendonlydir"
FILLER = "filler"
TIMEOUT_SECONDS = 2.0


def redis_command(port: int, folder: Path, primary_port: int | None = None) -> list[str]:
    """A server that appends every change to a file, flushed every second, and evicts nothing.

    Raises:
        Unavailable: there is no redis-server.
    """
    binary = shutil.which("redis-server")
    if binary is None:
        raise Unavailable("redis-server is not installed")
    flags = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "repl-diskless-sync-delay": "0",
        "loglevel": "notice",
    }
    if primary_port is not None:
        flags["replicaof"] = f"127.0.0.1 {primary_port}"
    return [binary, *(part for name, value in flags.items() for part in (f"--{name}", value))]


def client(port: int) -> redis.asyncio.Redis:
    """A client of a server on this machine."""
    return redis.asyncio.Redis(
        port=port, socket_timeout=TIMEOUT_SECONDS, socket_connect_timeout=TIMEOUT_SECONDS
    )


def answers(port: int, *, replica: bool = False) -> Check:
    """A check that the server has loaded its data, and as a replica has its primary's."""

    async def check() -> bool:
        async with client(port) as connection:
            try:
                await connection.ping()
                if not replica:
                    return True
                facts = await connection.info("replication")
            except (RedisError, OSError):
                return False
            # One that was made the primary has nobody to follow.
            return facts["role"] == "master" or facts.get("master_link_status") == "up"

    return check


def copy_log(folder: Path, place: Path) -> None:
    """Keep the append-only files as they are on disk now."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / AOF_FOLDER, place)


def put_log_back(folder: Path, place: Path) -> None:
    """Let a server that has ended find the files that were kept: what came later is lost."""
    shutil.rmtree(folder / AOF_FOLDER)
    shutil.copytree(place, folder / AOF_FOLDER)


def mount_small(folder: Path, size: str) -> None:
    """Put a small file system of its own at a folder.

    Raises:
        SpecinferError: this user may not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SpecinferError(f"cannot mount a small file system: {done.stderr.strip()}")


def unmount(folder: Path) -> None:
    """Take it away again."""
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def fill(folder: Path) -> None:
    """Write until the file system is full."""
    block = b"\0" * 65536
    try:
        with (folder / FILLER).open("wb", buffering=0) as filler:
            while filler.write(block):
                pass
    except OSError:
        return


def empty(folder: Path) -> None:
    """Make room again."""
    (folder / FILLER).unlink(missing_ok=True)
