"""How a session lies in Redis: its keys, its tokens as bytes, and the way back.

This module knows nothing of connections.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Sequence

from specinfer.errors import InvalidRequest
from specinfer_router.store.facts import terms_from_json
from specinfer_router.store.interface import SessionRecord, SessionSummary

PREFIX = "specinfer:"
SESSIONS = "specinfer:{*}:session"
# One tag of its own: the index lies in one slot, whatever the sessions' are.
UNATTENDED = "specinfer:{unattended}:leases"

_SESSION_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


def session_keys(session_id: str) -> list[str]:
    """The two keys of a session, in one slot; raises InvalidRequest."""
    if not _SESSION_ID.fullmatch(session_id):
        raise InvalidRequest(
            "a session id is 1 to 128 letters, digits, '-' and '_'", field="session_id"
        )
    return [f"specinfer:{{{session_id}}}:session", f"specinfer:{{{session_id}}}:tokens"]


def session_id_of(key: bytes) -> str:
    """The id in the name of a session's key."""
    return key.decode().partition("{")[2].partition("}")[0]


def document_key(name: str) -> str:
    """The key of a document."""
    return f"specinfer:document:{name}"


def pack(token_ids: Sequence[int]) -> bytes:
    """Tokens as unsigned 32-bit numbers, lowest byte first."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(packed: bytes) -> tuple[int, ...]:
    """The tokens that `pack` packed."""
    token_ids = array("I")
    token_ids.frombytes(packed)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return tuple(token_ids)


def record_of(session_id: str, fields: Sequence[bytes]) -> SessionRecord:
    """The record of (facts, epoch, owner, finish reason, tokens)."""
    facts, epoch, owner, finish_reason, packed = fields
    return SessionRecord(
        session_id=session_id,
        terms=terms_from_json(facts),
        token_ids=unpack(packed),
        epoch=int(epoch),
        owner=int(owner),
        finish_reason=finish_reason.decode(),
    )


def summary_of(
    session_id: str, texts: Sequence[bytes], lease_ms: int, num_bytes: int, ttl_ms: int
) -> SessionSummary:
    """The summary of (facts, epoch, finish reason, owner, holder) and what Redis measured."""
    facts, epoch, finish_reason, owner, holder = texts
    terms = terms_from_json(facts)
    return SessionSummary(
        session_id=session_id,
        key_id=terms.key_id,
        model_hash=terms.model_hash,
        epoch=int(epoch),
        num_tokens=num_bytes // 4,
        num_prompt_tokens=terms.num_prompt_tokens,
        finish_reason=finish_reason.decode(),
        owner=int(owner),
        holder=holder.decode(),
        lease_seconds=lease_ms / 1000,
        ttl_seconds=ttl_ms / 1000,
        request_id=terms.request_id,
        max_tokens=terms.stop.max_tokens or 0,
        unattended=terms.unattended,
    )
