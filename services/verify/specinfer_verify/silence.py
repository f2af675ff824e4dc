"""Which sessions have been silent for so long. Knows nothing of why, or what becomes of them."""

from __future__ import annotations

from collections.abc import Collection

from specinfer_verify.session import Session


def silent_for(sessions: Collection[Session], seconds: float, now: float) -> list[Session]:
    """Sessions without a step whose last item or answer is so long ago, the most silent first."""
    silent = [
        session
        for session in sessions
        if session.pending is None and now - session.last_active >= seconds
    ]
    return sorted(silent, key=lambda session: session.last_active)
