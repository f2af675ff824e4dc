"""The operators' client: looks at a cluster through one router, and ends sessions.

It speaks to the router's admin port, which asks for a key of the role "operator" where keys are
asked for at all. It knows nothing of generation.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, TypeVar

import grpc.aio

from specinfer.convert import cluster_from_wire, finding_from_wire, session_status_from_wire
from specinfer.credentials import Credentials, check_plain_text
from specinfer.errors import Unavailable
from specinfer.messages.admin import (
    CancelOutcome,
    ClusterStatus,
    Finding,
    SessionListing,
    SessionStatus,
)
from specinfer.rpc import TlsSettings, error_from_rpc, open_channel
from specinfer.v1 import admin_pb2, admin_pb2_grpc

DEFAULT_ADMIN_ADDRESS = "127.0.0.1:50052"

_Answer = TypeVar("_Answer")


class AdminClient:
    """A connection to one router's admin port; `async with` closes it.

    Every method raises the router's errors (SpecinferError), PermissionDenied for a key that is not
    an operator's among them, and Unavailable when nobody answers within `timeout` seconds. A key is
    never sent to another machine in plain text.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADMIN_ADDRESS,
        *,
        tls: TlsSettings | None = None,
        api_key: str | None = None,
        timeout: float = 10.0,
    ) -> None:
        if api_key is not None and tls is None:
            check_plain_text([address])
        self.address = address
        self._credentials = Credentials(api_key)
        self._timeout = timeout
        self._channel = open_channel(address, tls=tls)
        self._stub: Any = admin_pb2_grpc.AdminServiceStub(self._channel)

    async def __aenter__(self) -> AdminClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connection up."""
        await self._channel.close()

    async def cluster(self) -> ClusterStatus:
        """The router and every worker that it knows, now."""
        return cluster_from_wire(
            await self._ask(self._stub.GetCluster, admin_pb2.GetClusterRequest())
        )

    async def sessions(
        self, *, limit: int = 100, key_id: str = "", running_only: bool = False
    ) -> SessionListing:
        """Sessions that the store keeps, in no order.

        Args:
            limit: most sessions to list.
            key_id: only those of this key; "" lists all.
            running_only: only those that have not ended for good.
        """
        message = admin_pb2.ListSessionsRequest(
            limit=limit, key_id=key_id, running_only=running_only
        )
        answer = await self._ask(self._stub.ListSessions, message)
        found = tuple(session_status_from_wire(session) for session in answer.sessions)
        return SessionListing(found, answer.partial_reason)

    async def session(self, session_id: str) -> SessionStatus:
        """One session; raises NotFound."""
        message = admin_pb2.GetSessionRequest(session_id=session_id)
        answer = await self._ask(self._stub.GetSession, message)
        return session_status_from_wire(answer.session)

    async def cancel(self, session_id: str) -> CancelOutcome:
        """End a session for good, wherever it runs and whosever it is; raises NotFound."""
        message = admin_pb2.CancelSessionRequest(session_id=session_id)
        answer = await self._ask(self._stub.CancelSession, message)
        return CancelOutcome(answer.finish_reason, answer.had_ended)

    async def diagnose(self) -> tuple[Finding, ...]:
        """What the router finds wrong, or soon to be, with the cluster."""
        message = admin_pb2.DiagnoseRequest(unix_seconds=time.time())
        answer = await self._ask(self._stub.Diagnose, message)
        return tuple(finding_from_wire(finding) for finding in answer.findings)

    async def _ask(self, method: Callable[..., Awaitable[_Answer]], message: object) -> _Answer:
        metadata = await self._credentials.metadata()
        try:
            return await method(message, timeout=self._timeout, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise Unavailable(
                    f"the router at {self.address} did not answer within {self._timeout:g} s"
                ) from error
            raise error_from_rpc(error) from error
