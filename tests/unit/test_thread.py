"""The engine thread: items in, futures out, errors where they belong, an orderly end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

import pytest

from specinfer.errors import InternalError, InvalidRequest, ResourceExhausted, Unavailable
from specinfer_engine.thread import EngineThread, set_result

TIMEOUT = 20.0


def idle() -> bool:
    return False


@contextmanager
def running(step: Callable[[], bool] = idle, max_pending: int = 100) -> Iterator[EngineThread]:
    thread = EngineThread("test", step, idle_seconds=60.0, max_pending=max_pending)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop()


def test_calls_run_in_order_on_the_thread() -> None:
    seen: list[int] = []
    with running() as thread:
        futures = [thread.call(partial(seen.append, number)) for number in range(50)]
        name = thread.call(lambda: threading.current_thread().name)
        assert name.result(TIMEOUT) == "test"
    assert all(future.done() for future in futures)
    assert seen == list(range(50))


def test_a_thread_is_prepared_before_anything_else_and_before_start_returns() -> None:
    seen: list[str] = []
    thread = EngineThread("test", idle)
    thread.prepare = lambda: seen.append(threading.current_thread().name)
    thread.start()
    assert seen == ["test"]
    thread.stop()


def test_a_thread_that_cannot_be_prepared_takes_nothing() -> None:
    failed = threading.Event()
    thread = EngineThread("test", idle, on_failure=failed.set)
    thread.prepare = lambda: 1 // 0
    thread.start()
    assert failed.wait(TIMEOUT)
    with pytest.raises(InternalError, match="division"):
        thread.call(lambda: None)
    assert not thread.healthy
    thread.stop()


def test_an_item_may_be_answered_by_a_later_step() -> None:
    waiting: list[Future[str]] = []

    def step() -> bool:
        if waiting:
            set_result(waiting.pop(), "done")
            return True
        return False

    with running(step) as thread:
        assert thread.submit(waiting.append).result(TIMEOUT) == "done"
        assert thread.wait_idle(TIMEOUT)


def test_an_error_fails_its_item_alone() -> None:
    def fail(error: Exception) -> None:
        raise error

    with running() as thread:
        ours = thread.call(lambda: fail(InvalidRequest("bad")))
        fault = thread.call(lambda: fail(ValueError("broken")))
        good = thread.call(lambda: 7)
        assert isinstance(ours.exception(TIMEOUT), InvalidRequest)
        assert isinstance(fault.exception(TIMEOUT), InternalError)
        assert good.result(TIMEOUT) == 7
        assert thread.healthy


def test_a_failed_step_fails_everything_and_tells_once() -> None:
    told = threading.Event()
    kept: list[Future[None]] = []

    def step() -> bool:
        if len(kept) == 2:
            raise RuntimeError("no device")
        return False

    thread = EngineThread("test", step, on_failure=told.set)
    futures = [thread.submit(kept.append) for _ in range(2)]
    thread.start()
    for future in futures:
        with pytest.raises(InternalError, match="no device"):
            future.result(TIMEOUT)
    assert told.wait(TIMEOUT)
    assert not thread.healthy
    with pytest.raises(InternalError):
        thread.call(lambda: None)
    thread.stop()


def test_a_full_inbox_says_so() -> None:
    kept: list[Future[None]] = []
    with running(max_pending=2) as thread:
        for _ in range(2):
            thread.submit(kept.append)
        with pytest.raises(ResourceExhausted) as caught:
            thread.submit(kept.append)
        assert caught.value.retry_after
        assert thread.num_pending == 2


def test_stop_fails_what_is_pending_and_refuses_more() -> None:
    kept: list[Future[None]] = []
    with running() as thread:
        pending = thread.submit(kept.append)
        assert not thread.wait_idle(0.0)
    with pytest.raises(Unavailable):
        pending.result(TIMEOUT)
    with pytest.raises(Unavailable):
        thread.call(lambda: None)
    assert not thread.healthy


def test_an_item_cancelled_before_its_turn_is_skipped() -> None:
    thread = EngineThread("test", idle)
    seen: list[int] = []
    cancelled = thread.call(lambda: seen.append(1))
    kept = thread.call(lambda: seen.append(2))
    assert cancelled.cancel()
    thread.start()
    kept.result(TIMEOUT)
    thread.stop()
    assert seen == [2]


def test_work_goes_on_without_new_items() -> None:
    finished = threading.Event()
    count = [0]

    def step() -> bool:
        count[0] += 1
        if count[0] == 100:
            finished.set()
        return count[0] < 100

    with running(step):
        assert finished.wait(TIMEOUT), "no item came, and all hundred steps ran"


def test_what_is_told_is_done_although_too_much_is_pending() -> None:
    done = threading.Event()
    with running(max_pending=1) as thread:
        thread.submit(lambda future: None)
        with pytest.raises(ResourceExhausted):
            thread.call(lambda: None)
        thread.tell(done.set)
        assert done.wait(TIMEOUT)
    thread.tell(done.clear)
    assert done.is_set()
