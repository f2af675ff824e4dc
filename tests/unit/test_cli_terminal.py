"""`specinfer chat` in a terminal: the prompt, Ctrl-C during an answer, Ctrl-D at the prompt."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from specinfer.messages import GenerateEvent, GenerateRequest
from tests.kit.fake_router import FakeRouter, answer, running, started_event, tokens_event

CTRL_D = b"\x04"
PATIENCE_SECONDS = 60.0


def _take_interrupts() -> None:
    """A terminal's programs do not inherit that Ctrl-C is ignored, as background jobs do."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A `specinfer chat` on a pseudo-terminal."""

    def __init__(self, address: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "specinfer_cli.main", "chat", "--router", address],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_interrupts,
        )
        os.close(slave)
        self._seen = b""

    def wait_for(self, text: str) -> str:
        """Read until `text` comes; returns all since the last call."""
        while text.encode() not in self._seen:
            assert select.select([self._master], [], [], PATIENCE_SECONDS)[0], self._seen
            self._seen += os.read(self._master, 4096)
        before, _, self._seen = self._seen.partition(text.encode())
        return before.decode()

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    with running(FakeRouter()) as started:
        yield started


@pytest.fixture
def terminal(router: FakeRouter) -> Iterator[Terminal]:
    opened = Terminal(router.address)
    yield opened
    opened.close()


def test_an_answer_can_be_stopped(router: FakeRouter, terminal: Terminal) -> None:
    async def endless(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
        yield started_event(request)
        yield tokens_event(request, 0, [77])
        await asyncio.Event().wait()

    terminal.wait_for("fake. /help lists the commands.")
    terminal.wait_for("> ")
    router.script = endless
    terminal.type(b"first\r")
    terminal.wait_for(" w77")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("the turn is forgotten")
    assert router.cancelled.wait(PATIENCE_SECONDS)
    terminal.wait_for("> ")
    router.script = answer
    terminal.type(b"second\r")
    terminal.wait_for(" w")
    terminal.wait_for("> ")
    last = router.requests[-1].messages
    assert last is not None
    assert [message.content for message in last] == ["second"]
    terminal.type(CTRL_D)
    assert terminal.process.wait(PATIENCE_SECONDS) == 0
