"""The operators' gRPC service: asks for the role, calls, translates.

Everything else happens in `admin.py`. This module knows nothing of workers or stores.
"""

from __future__ import annotations

import logging
from typing import Any

from specinfer.convert import cluster_to_wire, finding_to_wire, session_status_to_wire
from specinfer.errors import PermissionDenied
from specinfer.server import RpcServer
from specinfer.v1 import admin_pb2, admin_pb2_grpc
from specinfer_router.access import OPERATOR
from specinfer_router.admin import Administration
from specinfer_router.keys.control import AccessControl, bearer_token

SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
DEFAULT_LIMIT = 100
MAX_ID_LENGTH = 128

log = logging.getLogger(__name__)


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Answers operators."""

    def __init__(self, administration: Administration, access: AccessControl) -> None:
        self._administration = administration
        self._access = access

    async def GetCluster(
        self, request: admin_pb2.GetClusterRequest, context: Any
    ) -> admin_pb2.GetClusterResponse:
        """This router and its workers."""
        self._check_operator(context, "GetCluster")
        return cluster_to_wire(await self._administration.cluster())

    async def ListSessions(
        self, request: admin_pb2.ListSessionsRequest, context: Any
    ) -> admin_pb2.ListSessionsResponse:
        """Sessions that the store keeps."""
        self._check_operator(context, "ListSessions")
        listing = await self._administration.sessions(
            request.limit or DEFAULT_LIMIT,
            key_id=request.key_id,
            running_only=request.running_only,
        )
        return admin_pb2.ListSessionsResponse(
            sessions=map(session_status_to_wire, listing.sessions),
            partial=listing.partial,
            partial_reason=listing.partial_reason,
        )

    async def GetSession(
        self, request: admin_pb2.GetSessionRequest, context: Any
    ) -> admin_pb2.GetSessionResponse:
        """One session."""
        self._check_operator(context, "GetSession", request.session_id)
        session = await self._administration.session(request.session_id)
        return admin_pb2.GetSessionResponse(session=session_status_to_wire(session))

    async def CancelSession(
        self, request: admin_pb2.CancelSessionRequest, context: Any
    ) -> admin_pb2.CancelSessionResponse:
        """End a session for good."""
        self._check_operator(context, "CancelSession", request.session_id)
        outcome = await self._administration.cancel(request.session_id)
        return admin_pb2.CancelSessionResponse(
            finish_reason=outcome.finish_reason, had_ended=outcome.had_ended
        )

    async def Diagnose(
        self, request: admin_pb2.DiagnoseRequest, context: Any
    ) -> admin_pb2.DiagnoseResponse:
        """What is wrong, or soon will be."""
        self._check_operator(context, "Diagnose")
        findings = await self._administration.diagnose(request.unix_seconds)
        return admin_pb2.DiagnoseResponse(findings=map(finding_to_wire, findings))

    def _check_operator(self, context: Any, rpc: str, session_id: str = "") -> None:
        """Note the call; raise Unauthenticated or PermissionDenied unless an operator calls."""
        metadata = dict(context.invocation_metadata() or ())
        caller = self._access.authenticate(bearer_token(metadata.get("authorization")))
        allowed = caller.role == OPERATOR
        # `top` asks each second: what only looks is told at a lower level.
        level = logging.DEBUG if allowed and rpc == "GetCluster" else logging.INFO
        facts = {"rpc": rpc, "key_id": caller.key_id, "allowed": allowed}
        asked = {"session_id": session_id[:MAX_ID_LENGTH]} if session_id else {}
        log.log(level, "operator call", extra=facts | asked)
        if not allowed:
            raise PermissionDenied(
                "this needs a key of the role operator: `specinfer keys create --role operator`",
                field="api_key",
            )


def add_administration(
    server: RpcServer, administration: Administration, access: AccessControl | None = None
) -> None:
    """Let a server answer operators, as far as `access` lets them in."""
    admin_pb2_grpc.add_AdminServiceServicer_to_server(
        AdminServicer(administration, access or AccessControl()), server.server
    )
