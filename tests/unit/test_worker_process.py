"""The process that both workers share: how it ends when its engine fails."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specinfer.errors import InternalError
from specinfer.messages import WorkerLoad
from specinfer.worker_process import ServedWorker, serve_worker
from specinfer.worker_settings import WorkerSettings
from tests.kit.fake_workers import info_of


class FragileEngine:
    """An engine without a model that may fail while it drains.

    Attributes:
        stopped: whether it was stopped.
        built_in: the thread that made it.
        builder_gone: whether that thread was gone when the engine started.
    """

    def __init__(self, report_failure: Callable[[], None], *, fails: bool) -> None:
        self._report_failure = report_failure
        self._fails = fails
        self.healthy = True
        self.stopped = False
        self.built_in = threading.current_thread()
        self.builder_gone = False

    def start(self) -> None:
        self.builder_gone = not self.built_in.is_alive()

    def load(self) -> WorkerLoad:
        return WorkerLoad()

    def drain(self, timeout: float) -> bool:
        if self._fails:
            self.healthy = False
            self._report_failure()
        return True

    def stop(self) -> None:
        self.stopped = True


def nothing(*arguments: Any, **named: Any) -> None:
    """A callback that does nothing."""


async def serve_and_drain(monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> FragileEngine:
    """Serve an engine, send the process SIGTERM once it listens to that, and wait for the end."""
    engines: list[FragileEngine] = []
    loop, listening = asyncio.get_running_loop(), asyncio.Event()
    add_handler = loop.add_signal_handler

    def add(number: int, *arguments: Any) -> None:
        add_handler(number, *arguments)
        if number == signal.SIGTERM:
            listening.set()

    def build(report_failure: Callable[[], None]) -> ServedWorker:
        engines.append(FragileEngine(report_failure, fails=fails))
        return ServedWorker(engines[0], info_of("fragile"), nothing, nothing)

    monkeypatch.setattr(loop, "add_signal_handler", add)
    settings = WorkerSettings(model=Path("none"))
    serving = asyncio.create_task(
        serve_worker(settings, tier="verify", service_name="test.Service", build=build)
    )
    async with asyncio.timeout(30):
        await listening.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await serving
    return engines[0]


async def test_a_drain_ends_the_process_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await serve_and_drain(monkeypatch, fails=False)
    assert engine.stopped


async def test_the_thread_that_built_is_gone_and_its_compute_threads_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = await serve_and_drain(monkeypatch, fails=False)
    assert engine.built_in is not threading.main_thread()
    assert engine.builder_gone


async def test_an_engine_that_fails_during_a_drain_ends_the_process_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InternalError, match="drained"):
        await serve_and_drain(monkeypatch, fails=True)
