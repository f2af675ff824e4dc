"""Responses without a reader whose router has died: looked for now and then, and run on here.

This module knows nothing of how the store tells that a router has died.
"""

from __future__ import annotations

import asyncio
import logging
import random

from specinfer.errors import LeaseLost, NotFound, SpecinferError
from specinfer.messages import ResumeRequest
from specinfer.tasks import end_task
from specinfer_router.access import Caller
from specinfer_router.gateway.responses_run import BackgroundRuns, written
from specinfer_router.gateway.responses_store import ResponseStore, response_id_of
from specinfer_router.router import Router
from specinfer_router.store import CANCELLED

log = logging.getLogger(__name__)

SWEEP_SECONDS = 3.0
# Found at once; several routers share what one has left.
MAX_FOUND = 8


class ResponseSweep:
    """Takes over the responses in the background of routers that are gone.

    Args:
        router: runs them on.
        runs: owns them while they run.
        seconds: mean time from one look to the next; each differs, so that routers do not all look
            at once.
    """

    def __init__(
        self, router: Router, runs: BackgroundRuns, *, seconds: float = SWEEP_SECONDS
    ) -> None:
        self._router = router
        self._runs = runs
        self._seconds = seconds
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._sweep_on(), name="sweep of responses")

    async def close(self) -> None:
        """Look no more."""
        await end_task(self._task)

    async def sweep(self) -> int:
        """Look once; returns how many were taken over."""
        most = min(MAX_FOUND, self._runs.num_free)
        if self._router.draining or most == 0:
            return 0
        taken = 0
        for session_id in await self._router.store.orphans(most):
            try:
                taken += await self._take_over(session_id)
            except LeaseLost:
                pass  # another router was faster
            except SpecinferError as error:
                # Such as one of another model: the others are not to wait for it.
                about = {"session_id": session_id, "error": error.message}
                log.info("an orphaned response could not be taken over", extra=about)
            except Exception:
                about = {"session_id": session_id}
                log.exception("taking an orphaned response over failed", extra=about)
        return taken

    async def _sweep_on(self) -> None:
        while True:
            await asyncio.sleep(self._seconds * random.uniform(0.5, 1.5))
            try:
                await self.sweep()
            except SpecinferError as error:
                log.info("looking for orphaned responses failed: %s", error.message)
            except Exception:  # one that cannot be read must not end the looking
                log.exception("looking for orphaned responses failed")

    async def _take_over(self, session_id: str) -> bool:
        keep = ResponseStore(self._router.store)
        try:
            stored = await keep.read(response_id_of(session_id))
        except NotFound:
            stored = None
        if stored is None or not stored.running:
            # Deleted, or never told to anybody: nobody could ask for it.
            await self._router.store.finish(session_id, CANCELLED)
            return False
        caller = Caller(stored.key_id)
        request = ResumeRequest(session_id, 0)
        stream = self._router.resume(request, caller, orphaned_only=True)
        await self._runs.start(written(self._router, stream, stored, keep=keep))
        log.info("took a response over", extra={"session_id": session_id})
        return True
