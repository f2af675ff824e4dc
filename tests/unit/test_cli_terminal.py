"""`specinfer chat` in a terminal: tinted answers, live rounds, Ctrl-C, Ctrl-D, a dumb terminal."""

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

from specinfer.messages import GenerateEvent, GenerateRequest, RoundDetail
from specinfer.tree import TokenTree
from tests.kit.fake_router import (
    FakeRouter,
    answer,
    fake_tokens,
    finished_event,
    running,
    started_event,
    tokens_event,
)

CTRL_D = b"\x04"
PATIENCE_SECONDS = 60.0


# A terminal's programs do not inherit that Ctrl-C is ignored, as background jobs do. Set by the
# child itself: code that runs between fork and exec does not go with gRPC's threads.
CHAT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from specinfer_cli.main import main
main()
"""


class Terminal:
    """A `specinfer chat` on a pseudo-terminal."""

    def __init__(self, address: str, kind: str = "xterm-256color") -> None:
        self._master, slave = pty.openpty()
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHAT, "chat", "--router", address],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment | {"TERM": kind},
            start_new_session=True,
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
    terminal.wait_for("w77")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("the turn is forgotten")
    assert router.cancelled.wait(PATIENCE_SECONDS)
    terminal.wait_for("> ")
    router.script = answer
    terminal.type(b"second\r")
    terminal.wait_for("tokens a round")
    terminal.wait_for("> ")
    last = router.requests[-1].messages
    assert last is not None
    assert [message.content for message in last] == ["second"]
    terminal.type(CTRL_D)
    assert terminal.process.wait(PATIENCE_SECONDS) == 0


async def detailed(request: GenerateRequest, attempt: int) -> AsyncIterator[GenerateEvent]:
    """Two rounds: a guess of two of which one is confirmed, then none."""
    tree = TokenTree((9, 10, 11), (-1, 0, 0))
    yield started_event(request)
    for offset, tokens in ((0, [10, 12]), (2, [13])):
        event = tokens_event(request, offset, tokens)
        accepted = (1,) if event.num_accepted_tokens else ()
        words = tuple(f" w{token}" for token in tokens)
        detail = RoundDetail(tree, accepted, (" w9", " w10", " w11"), words)
        yield event._replace(detail=detail if request.detail else None)
    yield finished_event(3, 2)


def test_an_answer_shows_its_rounds(router: FakeRouter, terminal: Terminal) -> None:
    router.script = detailed
    terminal.wait_for("> ")
    terminal.type(b"first\r")
    shown = terminal.wait_for("the target's own")
    assert router.requests[-1].detail
    # Green is what was guessed and confirmed, a line below what is the target's own.
    assert "\x1b[32m w10\x1b[0m" in shown
    assert "\x1b[4mw12\x1b[0m" in shown
    assert "1.50 " in shown
    assert "100%" in shown
    terminal.wait_for("> ")
    terminal.type(b"/rounds\r")
    assert "w12" in terminal.wait_for("└─")
    terminal.wait_for("> ")
    terminal.type(b"/again\r")
    terminal.wait_for("once more without speculation, seed 4242")
    terminal.wait_for("identical: all 3 tokens; speculation ran at ")
    assert not router.requests[-1].speculation.enabled
    assert router.requests[-1].sampling.seed == 4242
    assert router.requests[-1].messages == router.requests[-2].messages


def test_a_terminal_that_cannot_redraw_gets_plain_text(router: FakeRouter) -> None:
    terminal = Terminal(router.address, kind="dumb")
    try:
        terminal.wait_for("> ")
        terminal.type(b"first\r")
        shown = terminal.wait_for("> ")
        assert "\x1b[" not in shown
        words = [f"w{token}" for token in fake_tokens(router.requests[-1], 9)]
        assert " ".join(words) in shown
        assert not router.requests[-1].detail
    finally:
        terminal.close()
