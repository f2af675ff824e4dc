"""A thread that owns an engine: items come in through a bounded inbox, futures go out.

    submit(handle) -> Future      `handle(future)` runs on the thread between two steps and either
                                  completes the future or keeps it for a later step
    step() -> bool                runs while there is work; False means nothing to do for now

An error in one item fails that item; an error in a step fails everything pending and ends the
thread, since nobody knows what state it left. This module knows nothing of models, sessions or the
event loop that may wait for the futures.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from specinfer.errors import InternalError, ResourceExhausted, SpecinferError, Unavailable

Result = TypeVar("Result")
Handle = Callable[["Future[Any]"], None]

logger = logging.getLogger(__name__)


class EngineThread:
    """Runs `step` on a thread of its own and hands items to it.

    Args:
        name: of the thread, for logs.
        step: does one unit of work; returns whether it did any.
        max_pending: most items submitted and not yet completed.
        idle_seconds: how long the thread sleeps at most between looks for work that only time
            brings, such as the eviction of idle sessions; a function is asked before each sleep.
        on_failure: called on the thread, once, when a step has failed.

    Attributes:
        prepare: called on the thread before anything else, for what belongs to a thread, such as
            how many others it computes with; to be set before `start`.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], bool],
        *,
        max_pending: int = 4096,
        idle_seconds: float | Callable[[], float] = 1.0,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self._step = step
        self._max_pending = max_pending
        self._idle_seconds = idle_seconds
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[tuple[Handle, Future[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Condition()
        self._pending: set[Future[Any]] = set()
        self._stopping = False
        self._failure: BaseException | None = None
        self.prepare: Callable[[], object] = lambda: None
        self._prepared = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread; returns once it is prepared."""
        self._thread.start()
        self._prepared.wait()

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and takes items."""
        return self._thread.is_alive() and self._failure is None and not self._stopping

    @property
    def num_pending(self) -> int:
        """Items submitted and not yet completed."""
        return len(self._pending)

    def submit(self, handle: Callable[[Future[Result]], None]) -> Future[Result]:
        """Have `handle(future)` called on the thread.

        Raises:
            ResourceExhausted: when too many items are pending.
            Unavailable: when the thread is stopping.
            InternalError: when the thread has crashed.
        """
        future: Future[Result] = Future()
        with self._lock:
            if self._failure is not None:
                raise InternalError(f"the engine has failed: {self._failure}")
            if self._stopping:
                raise Unavailable("the engine is stopping")
            if len(self._pending) >= self._max_pending:
                raise ResourceExhausted(f"{len(self._pending)} items are pending", retry_after=0.1)
            self._pending.add(future)
            self._inbox.put((handle, future))
        future.add_done_callback(self._forget)
        return future

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Have `function` called on the thread; the future takes its result or its error."""
        return self.submit(lambda future: future.set_result(function()))

    def tell(self, function: Callable[[], object]) -> None:
        """Have `function` called on the thread, however many items are pending; nobody waits.

        For what has to happen and comes seldom, such as cleaning up after a peer that left. Does
        nothing once the thread has ended or is about to.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._failure is not None or self._stopping:
                return
            self._pending.add(future)
            self._inbox.put((lambda taken: taken.set_result(function()), future))
        future.add_done_callback(self._forget)

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing is pending; False when `timeout` seconds were not enough."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._pending, timeout)

    def stop(self, timeout: float | None = None) -> None:
        """End the thread after its current step; what is still pending fails with Unavailable."""
        with self._lock:
            self._stopping = True
            self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._fail_pending(Unavailable("the engine has stopped"))

    def _run(self) -> None:
        try:
            self._prepare()
            working = True
            while not self._stopping:
                self._take_items(wait=not working)
                working = self._step()
        except BaseException as error:
            logger.exception("engine thread failed")
            with self._lock:
                self._failure = error
            self._fail_pending(InternalError(f"the engine has failed: {error}"))
            if self._on_failure is not None:
                self._on_failure()

    def _prepare(self) -> None:
        try:
            self.prepare()
        finally:
            self._prepared.set()

    def _take_items(self, *, wait: bool) -> None:
        """Handle everything in the inbox; wait for the first item when there is no work."""
        try:
            idle = self._idle_seconds
            seconds = (idle() if callable(idle) else idle) if wait else None
            item = self._inbox.get(wait, seconds)
            while True:
                if item is not None:
                    self._handle(*item)
                item = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _handle(self, handle: Handle, future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            handle(future)
        except SpecinferError as error:
            set_exception(future, error)
        except Exception as error:
            logger.exception("an item failed")
            set_exception(future, InternalError(f"{type(error).__name__}: {error}"))

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._pending.discard(future)
            self._lock.notify_all()

    def _fail_pending(self, error: SpecinferError) -> None:
        for future in list(self._pending):
            set_exception(future, error)


def set_result(future: Future[Result], result: Result) -> None:
    """Complete a future unless it is complete already."""
    with contextlib.suppress(InvalidStateError):
        future.set_result(result)


def set_exception(future: Future[Any], error: Exception) -> None:
    """Fail a future unless it is complete already."""
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)
