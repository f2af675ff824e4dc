"""Runs of responses: a stream of the router written as a response and kept in the store.

Those in the background go on without a reader, in tasks that one object owns. This module knows
nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from specinfer.errors import (
    NotFound,
    ResourceExhausted,
    RouterLeaving,
    SpecinferError,
    StaleEpoch,
)
from specinfer.messages import Finished, GenerateEvent, RoundFacts, Started, TokensEvent
from specinfer_router.access import Caller
from specinfer_router.gateway.responses_request import ResponseBody, response_plan
from specinfer_router.gateway.responses_store import (
    ResponseStore,
    StoredResponse,
    response_id_of,
)
from specinfer_router.gateway.responses_writer import ResponseWriter
from specinfer_router.gateway.tools import ToolPlan
from specinfer_router.router import Router
from specinfer_router.store.interface import RESUMABLE

log = logging.getLogger(__name__)

Events = AsyncGenerator[dict[str, Any], None]


async def written(
    router: Router,
    stream: AsyncGenerator[GenerateEvent, None],
    stored: StoredResponse,
    *,
    plan: ToolPlan | None = None,
    after: int = -1,
    keep: ResponseStore | None = None,
    raising: bool = False,
) -> Events:
    """The events of a response; the last one carries it complete.

    Args:
        router: for its tokenizer and store.
        stream: from the completion's first token on; closed at the end.
        stored: what is known so far; a new one has no session, and gets its id with it.
        plan: of its tools, where it was made already.
        after: events with this sequence number and lower ones are left out.
        keep: where to put the response when it begins, unless it is known there, and when it ends;
            or None.
        raising: raise every error, rather than end with an event that tells of one that no retry
            mends.

    Raises:
        StaleEpoch: somebody else has taken the response over, and will keep its end.
        SpecinferError: whatever the stream raises; one that no retry mends is kept as a failed
            response.
    """
    async with aclosing(stream) as events:
        started = await anext(events)
        assert isinstance(started, Started)
        new = not stored.session_id
        if new:
            stored = _begun(stored, started)
        if plan is None:
            plan = await asyncio.to_thread(_plan, stored, router.tokenizer.chat_template)
        writer = await _writer(router, stored, plan, after)
        if keep is not None and new:
            await keep.put(stored)
        for out in writer.begin():
            yield out
        try:
            async for event in events:
                for out in await _turn(writer, event, stored, keep):
                    yield out
        except StaleEpoch:
            raise
        except SpecinferError as error:
            known = stored.response["error"]
            if error.retryable and known is None:
                raise
            last = writer.fail(known["message"] if known else error.message)
            if keep is not None:
                await keep.end(replace(stored, response=writer.response))
            if raising:
                raise
            for out in last:
                yield out


def _begun(stored: StoredResponse, started: Started) -> StoredResponse:
    """A new response, once there is a session."""
    known = {"id": response_id_of(started.session_id), "model": started.model}
    return replace(stored, session_id=started.session_id, response=stored.response | known)


async def _turn(
    writer: ResponseWriter,
    event: GenerateEvent,
    stored: StoredResponse,
    keep: ResponseStore | None,
) -> list[dict[str, Any]]:
    """What an event of the router makes; the end is kept before anybody hears of it."""
    assert not isinstance(event, Started)
    if not isinstance(event, Finished):
        return writer.take(event)
    last = writer.finish(event)
    if keep is not None:
        await keep.end(replace(stored, response=writer.response))
    return last


def _plan(stored: StoredResponse, template: str) -> ToolPlan:
    return response_plan(ResponseBody.model_validate(stored.request), template)


async def _writer(
    router: Router, stored: StoredResponse, plan: ToolPlan, after: int
) -> ResponseWriter:
    """A writer at the start of a response, wherever its events were left."""
    record = await router.store.load(stored.session_id)
    prompt_ids = record.token_ids[: record.terms.num_prompt_tokens]
    tokenizer = router.tokenizer
    return ResponseWriter(
        stored.response,
        plan,
        vocabulary=tokenizer.vocabulary,
        detokenizer=tokenizer.vocabulary.detokenizer(prompt_ids),
        eos_token_ids=tokenizer.eos_token_ids,
        after=after,
    )


class BackgroundRuns:
    """Owns the responses that run without a reader, a bounded number of them."""

    def __init__(self, max_runs: int = 256) -> None:
        self._max_runs = max_runs
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def num_free(self) -> int:
        """Responses that there is room for."""
        return max(0, self._max_runs - len(self._tasks))

    async def start(self, events: Events) -> dict[str, Any]:
        """Run a response to its end; returns its first event.

        Raises:
            ResourceExhausted: too many run already.
            SpecinferError: the response could not begin.
        """
        if not self.num_free:
            await events.aclose()
            raise ResourceExhausted(
                f"{self._max_runs} responses run in the background; try again later",
                retry_after=1.0,
            )
        begun: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(_run(events, begun), name="background response")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await begun
        except asyncio.CancelledError:
            # Nobody has learnt its id, so nobody could ever ask for it.
            task.cancel()
            raise

    async def close(self) -> None:
        """Give all of them up; each can be resumed."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _run(events: Events, begun: asyncio.Future[dict[str, Any]]) -> None:
    try:
        async with aclosing(events):
            async for event in events:
                if not begun.done():
                    begun.set_result(event)
    except SpecinferError as error:
        if not begun.done():
            begun.set_exception(error)
        elif isinstance(error, RouterLeaving):
            log.info("a response in the background goes on elsewhere")
        else:
            log.warning("a response in the background broke", extra={"reason": error.reason})
    except Exception as error:  # it must reach whoever waits, or the log
        if begun.done():
            log.exception("a response in the background failed")
        else:
            begun.set_exception(error)


async def up_to_now(
    router: Router, stored: StoredResponse, caller: Caller, keep: ResponseStore
) -> StoredResponse:
    """A response with what there is of its output by now; its end is kept if it has come."""
    if not stored.running:
        return stored
    try:
        record = await router.store.load(stored.session_id)
    except NotFound:
        return stored
    if record.finish_reason in RESUMABLE:
        plan = await asyncio.to_thread(_plan, stored, router.tokenizer.chat_template)
        writer = await _writer(router, stored, plan, after=-1)
        facts = RoundFacts(record.epoch)
        await asyncio.to_thread(writer.take, TokensEvent(0, "", record.output_ids, 0, (), facts))
        return replace(stored, response=writer.so_far())
    # Whoever ran it has died after its last round, or is about to write this down.
    last: dict[str, Any] = {}
    along = router.follow(stored.session_id, 0, caller)
    async with aclosing(written(router, along, stored, keep=keep)) as events:
        async for event in events:
            last = event.get("response", last)
    return replace(stored, response=last)


async def cancel_run(
    router: Router, stored: StoredResponse, caller: Caller, keep: ResponseStore
) -> StoredResponse:
    """End a response wherever it runs; one that has ended stays as it is.

    Returns it with its text so far. One that ends by itself meanwhile keeps the end that it made:
    the session alone knows which of the two came first.

    Raises:
        ResourceExhausted: too many streams are read along to read this one's text.
    """
    if not stored.running:
        return stored
    last: dict[str, Any] = {}
    try:
        await router.cancel(stored.session_id, caller)
        now = await keep.get(stored.response["id"], caller)
        if not now.running:
            return now
        # Whoever runs it writes the same text from the same tokens.
        along = router.follow(stored.session_id, 0, caller)
        async with aclosing(written(router, along, stored, keep=keep)) as events:
            async for event in events:
                last = event.get("response", last)
    except NotFound:
        # Either has expired or was deleted, and with it all that could be told.
        last = stored.response | {"status": "cancelled"}
        await keep.end(replace(stored, response=last))
    return replace(stored, response=last)
