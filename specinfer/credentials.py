"""Who a client says it is: an API key, or a function that gives the token of the moment.

Keys are never put into errors or representations. This module knows nothing of TLS, channels or
what a server does with a key.
"""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
from collections.abc import Awaitable, Callable, Sequence

from specinfer.errors import InvalidRequest

TokenProvider = Callable[[], str | Awaitable[str]]

MAX_KEY_LENGTH = 4096


class Credentials:
    """The `authorization` of each call.

    Attributes:
        renewable: whether a refused token may be replaced by asking the provider again.
    """

    def __init__(self, api_key: str | None = None, provider: TokenProvider | None = None) -> None:
        """Take down a key or a provider, or neither.

        Raises:
            InvalidRequest: both were given, or the key could not stand in metadata.
        """
        if api_key is not None and provider is not None:
            raise InvalidRequest("give api_key or token_provider, not both", field="api_key")
        if provider is not None and not callable(provider):
            raise InvalidRequest("token_provider is a function", field="token_provider")
        self._key = None if api_key is None else _checked(api_key, "api_key")
        self._provider = provider
        self.renewable = provider is not None

    @property
    def present(self) -> bool:
        """Whether calls carry a key or a token."""
        return self._key is not None or self._provider is not None

    async def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of one call; raises InvalidRequest for a token that is none, and whatever the
        provider raises."""
        if not self.present:
            return ()
        token = self._key
        if self._provider is not None:
            token = _checked(await _provided(self._provider), "token_provider")
        return (("authorization", f"Bearer {token}"),)


async def _provided(provider: TokenProvider) -> object:
    # A plain function may read a file or ask a server: not on the event loop.
    is_async = inspect.iscoroutinefunction(provider) or inspect.iscoroutinefunction(
        getattr(provider, "__call__", None)  # noqa: B004 - an object's own async __call__
    )
    token = provider() if is_async else await asyncio.to_thread(provider)
    return await token if inspect.isawaitable(token) else token


def _checked(token: object, field: str) -> str:
    good = isinstance(token, str) and 0 < len(token) <= MAX_KEY_LENGTH
    if not isinstance(token, str) or not good or not token.isascii():
        raise InvalidRequest(f"{field} gives 1 to {MAX_KEY_LENGTH} ASCII characters", field=field)
    if not token.isprintable() or " " in token:
        raise InvalidRequest(f"{field} has no spaces or control characters", field=field)
    return token


def check_plain_text(addresses: Sequence[str]) -> None:
    """Raise InvalidRequest when a key would leave this machine unencrypted."""
    for address in addresses:
        if not is_loopback(address):
            raise InvalidRequest(
                f"the key would travel to {address} in plain text, where anybody on the way can "
                "read it; give tls=TlsSettings(...), or allow it with allow_insecure_key=True",
                field="api_key",
            )


def is_loopback(address: str) -> bool:
    """Whether a gRPC target surely stays on this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.removeprefix("dns:///").removeprefix("ipv4:").removeprefix("ipv6:")
    name, colon, port = host.rpartition(":")
    # A list of addresses, or a bare IPv6 address, is more than this function answers for.
    if "," in host or (colon and not port.isdigit()):
        return False
    name = name if colon else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
