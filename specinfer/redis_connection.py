"""How every process of specinfer reaches Redis, and how Redis's failures become our errors.

Needs the `serve` extra. This module knows nothing of what is kept there.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterError,
    MovedError,
    NoPermissionError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    TimeoutError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from specinfer.errors import InternalError, InvalidRequest, SpecinferError, Unavailable
from specinfer.telemetry import CLIENT, AttributeValue, Span, current_span

_Answer = TypeVar("_Answer")
# What the client raises. Two of a cluster's errors are none of its RedisErrors.
FAILURES: tuple[type[Exception], ...] = (RedisError, RedisClusterException, OSError)
# What passes by itself: no connection, one that broke, a server that loads, lost its place as the
# primary, has no majority, or moves slots; a cluster without any
# node. The first of them also covers a full connection pool.
AWAY: tuple[type[Exception], ...] = (
    RedisConnectionError,
    TimeoutError,
    BusyLoadingError,
    ReadOnlyError,
    ClusterError,
    RedisClusterException,
    MovedError,
    TryAgainError,
    OSError,
)
# How it answers while its memory or its disk is full, or its replicas are gone.
WRITES_REFUSED = ("OOM ", "MISCONF ", "NOREPLICAS ", "command not allowed when used memory")


@dataclass(frozen=True)
class RedisSettings:
    """Where Redis is and how to speak to it.

    Attributes:
        url: such as "redis://127.0.0.1:6379/0", or "rediss://user@host:6380/0" for TLS.
        password_file: file that holds the password, so that it is in no command line, or None.
        ca: PEM file of the certificates to trust; None trusts the system's.
        certificate: PEM file of our own certificate, or None.
        key: PEM file of its private key, or None.
        cluster: whether `url` is a node of a Redis Cluster.
        timeout_seconds: longest wait for a connection or an answer.
        max_connections: bound of the pool.
        num_retries: how often a command is sent again, with jittered pauses; every command of ours
            may be sent twice.
    """

    url: str
    password_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    cluster: bool = False
    timeout_seconds: float = 2.0
    max_connections: int = 32
    num_retries: int = 2

    def __post_init__(self) -> None:
        given = self.ca or self.certificate or self.key
        if given is not None and not self.url.startswith("rediss://"):
            raise InvalidRequest(
                f"{given} would not be used: {self.place} speaks plain text; TLS is rediss://",
                field="redis",
            )

    @property
    def place(self) -> str:
        """The address without user and password, for people."""
        try:
            parts = urlsplit(self.url)
        except ValueError:
            return "what was given"
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def connect(self) -> Redis | RedisCluster:
        """A client; the first command connects.

        Raises:
            InvalidRequest: the URL is none, or a file cannot be read.
        """
        try:
            options: dict[str, Any] = dict(parse_url(self.url))
        except ValueError as error:
            raise InvalidRequest(
                f"{self.place} is no Redis URL; one looks like redis://127.0.0.1:6379/0",
                field="redis",
            ) from error
        encrypted = self.url.startswith("rediss://")
        password = self._password()
        shared: dict[str, Any] = {
            **({} if password is None else {"password": password}),
            "socket_timeout": self.timeout_seconds,
            "socket_connect_timeout": self.timeout_seconds,
            "socket_keepalive": True,
            "health_check_interval": 30,
            "retry": Retry(
                ExponentialWithJitterBackoff(base=0.02, cap=0.5),
                self.num_retries,
                supported_errors=(RedisConnectionError, TimeoutError),
            ),
            **(self._certificates() if encrypted else {}),
        }
        if self.cluster:
            options.pop("connection_class", None)
            options.pop("db", None)
            return RedisCluster(
                **options, **shared, ssl=encrypted, max_connections=self.max_connections
            )
        pool = BlockingConnectionPool.from_url(
            self.url, timeout=self.timeout_seconds, max_connections=self.max_connections, **shared
        )
        return Redis(connection_pool=pool)

    def span(self, operation: str) -> Span:
        """A span for one operation, to be used as a block; none where nothing is recorded."""
        span = current_span()
        if not span.recording:
            return span
        parts = urlsplit(self.url)
        about: dict[str, AttributeValue] = {
            "db.system.name": "redis",
            "db.operation.name": operation,
            "server.address": parts.hostname or "",
            "server.port": parts.port or 6379,
        }
        return span.child(f"redis {operation}", about, kind=CLIENT)

    async def answer(self, call: Awaitable[_Answer]) -> _Answer:
        """What a command answers.

        Raises:
            Unavailable: Redis is away for now; it is worth asking again.
            InvalidRequest: it refuses us: wrong password, or a right that the user lacks.
            InternalError: it refuses the command.
        """
        try:
            return await call
        except FAILURES as error:
            raise self.error(error) from error

    def error(self, error: Exception) -> SpecinferError:
        """What `answer` raises for one of FAILURES."""
        if isinstance(error, (AuthenticationError, NoPermissionError)):
            return InvalidRequest(
                f"Redis at {self.place} refuses us: {error}; check the user, its password and its "
                "ACL (docs/sessions.md has the line)",
                field="redis",
            )
        if isinstance(error, AWAY):
            return Unavailable(
                f"Redis at {self.place} cannot be reached ({type(error).__name__}: {error}); "
                "start it or correct --redis"
            )
        if str(error).startswith(WRITES_REFUSED):
            return Unavailable(f"Redis at {self.place} takes no writes: {error}")
        return InternalError(f"Redis at {self.place} refused a command: {error}")

    def _password(self) -> str | None:
        if self.password_file is None:
            return None
        try:
            return self.password_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise InvalidRequest(
                f"the file of Redis's password cannot be read: {error}", field="redis_password_file"
            ) from error

    def _certificates(self) -> dict[str, Any]:
        for name in ("ca", "certificate", "key"):
            path: Path | None = getattr(self, name)
            if path is not None and not path.is_file():
                raise InvalidRequest(f"there is no file {path}", field=f"redis_{name}")
        return {
            "ssl_cert_reqs": ssl.CERT_REQUIRED,
            "ssl_ca_certs": None if self.ca is None else str(self.ca),
            "ssl_certfile": None if self.certificate is None else str(self.certificate),
            "ssl_keyfile": None if self.key is None else str(self.key),
        }


async def close(client: Redis | RedisCluster) -> None:
    """Give a client's connections up."""
    await client.aclose()
    if isinstance(client, Redis):
        await client.connection_pool.aclose()


class RedisOptions(Protocol):
    """What the settings of a process say of Redis; see `RedisSettings`."""

    @property
    def redis(self) -> str:
        """The URL, or "" for none."""
        ...

    @property
    def redis_password_file(self) -> Path | None:
        """File that holds the password."""
        ...

    @property
    def redis_ca(self) -> Path | None:
        """Certificates to trust."""
        ...

    @property
    def redis_certificate(self) -> Path | None:
        """Our own certificate."""
        ...

    @property
    def redis_key(self) -> Path | None:
        """Its private key."""
        ...

    @property
    def redis_cluster(self) -> bool:
        """Whether it is a cluster."""
        ...


def redis_of(options: RedisOptions) -> RedisSettings | None:
    """How a process reaches Redis, or None where it is told of none.

    Raises:
        InvalidRequest: options that would not be used.
    """
    if options.redis:
        return RedisSettings(
            url=options.redis,
            password_file=options.redis_password_file,
            ca=options.redis_ca,
            certificate=options.redis_certificate,
            key=options.redis_key,
            cluster=options.redis_cluster,
        )
    for part in ("password_file", "ca", "certificate", "key", "cluster"):
        if getattr(options, f"redis_{part}"):
            flag = f"--redis-{part.replace('_', '-')}"
            raise InvalidRequest(f"{flag} needs --redis URL", field=f"redis_{part}")
    return None
