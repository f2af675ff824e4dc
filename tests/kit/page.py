"""What the tests of the chat page share: a scripted model behind the real protocol, and helpers.

The model answers with given rounds, and breaks, refuses or waits where a test tells it to. It knows
nothing of the page.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from playwright.async_api import ConsoleMessage, Page, expect
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Round = dict[str, Any]


def round_of(accepted: list[str], own: str, rejected: list[str] | None = None) -> Round:
    """A round whose tree is the chain of `accepted` with `rejected` beside its first node."""
    rejected = rejected or []
    return {
        "tokens": [{"text": text, "accepted": True} for text in accepted]
        + [{"text": own, "accepted": False}],
        "tree": {
            "texts": ["root", *accepted, *rejected],
            "parents": [-1, *range(len(accepted)), *(0 for _ in rejected)],
            "accepted": list(range(1, len(accepted) + 1)),
        },
        "round": {
            "num_draft_tokens": len(accepted) + len(rejected),
            "num_accepted_tokens": len(accepted),
            "root_only_reason": "" if accepted or rejected else "disabled",
            "draft_seconds": 0.001,
            "verify_seconds": 0.004,
        },
    }


def plain_rounds(rounds: list[Round]) -> list[Round]:
    """The same tokens, one a round."""
    return [round_of([], token["text"]) for each in rounds for token in each["tokens"]]


def text_of(rounds: list[Round]) -> str:
    """All tokens' texts."""
    return "".join(token["text"] for each in rounds for token in each["tokens"])


ROUNDS = [
    round_of(["The", " function", " wraps"], " text", [" a", " x"]),
    round_of([" and", " returns"], " lines", [" the"]),
    round_of([], "."),
]


@dataclass
class ScriptedModel:
    """Answers every request with `rounds`, and does to its streams what a test says.

    Attributes:
        address: where it is served.
        rounds: what it answers.
        contents: text of each round's chunk where it is not the tokens' own.
        cuts: tokens after which a stream waits for `cut`, one for each call.
        refusals: (status, body, headers) given instead of an answer, one for each call.
        failure: (tokens, error) sent in mid-stream, once.
        hold_after: tokens after which a stream waits for `release`.
        key: what callers have to show, or "".
        ready: whether it says that it is ready.
        chat: whether it says that it has a chat template.
        calls: bodies and headers received.
        left: set when a reader leaves a stream that waits.
    """

    address: str = ""
    rounds: list[Round] = field(default_factory=lambda: list(ROUNDS))
    contents: list[str] | None = None
    cuts: list[int] = field(default_factory=list)
    refusals: list[tuple[int, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    failure: tuple[int, dict[str, Any]] | None = None
    hold_after: int | None = None
    key: str = ""
    ready: bool = True
    chat: bool = True
    calls: list[tuple[dict[str, Any], dict[str, str]]] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    _cut: asyncio.Event = field(default_factory=asyncio.Event)
    _released: asyncio.Event = field(default_factory=asyncio.Event)

    def reset(self) -> None:
        """Forget all that a test said, and what was received."""
        vars(self).update(vars(ScriptedModel(address=self.address)))

    def routes(self) -> list[Route]:
        """The routes that the page calls."""
        return [
            Route("/health/ready", self._ready),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._generate, methods=["POST"]),
            Route("/v1/completions", self._generate, methods=["POST"]),
        ]

    def release(self) -> None:
        """Let a held stream go on."""
        self._released.set()

    def cut(self) -> None:
        """Cut the connection of the stream that waits for it."""
        self._cut.set()

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for body, _ in self.calls]

    async def _ready(self, request: Request) -> Response:
        if self.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": "no verify worker is ready"}, 503)

    async def _models(self, request: Request) -> Response:
        if not self._may(request):
            return _refusal(401, "This call needs a key.")
        facts = {"plain_round_seconds": 0.02, "chat": self.chat}
        return JSONResponse({"data": [{"id": "scripted", "object": "model", "specinfer": facts}]})

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        self.calls.append((body, dict(request.headers)))
        if not self._may(request):
            return _refusal(401, "This call needs a key.")
        if self.refusals:
            status, answer, headers = self.refusals.pop(0)
            return JSONResponse(answer, status, headers)
        _, _, offset = request.headers.get("last-event-id", "session:0").partition(":")
        is_chat = request.url.path.endswith("/chat/completions")
        events = self._events(body, is_chat, int(offset))
        return StreamingResponse(events, media_type="text/event-stream")

    def _may(self, request: Request) -> bool:
        return not self.key or request.headers.get("authorization") == f"Bearer {self.key}"

    async def _events(self, body: dict[str, Any], is_chat: bool, offset: int) -> AsyncIterator[str]:
        rounds = self.rounds if body["speculation"]["enabled"] else plain_rounds(self.rounds)
        cut = self.cuts.pop(0) if self.cuts else None
        yield _event({"choices": [_choice(is_chat, "")]}, offset)
        sent = 0
        for index, each in enumerate(rounds):
            sent += len(each["tokens"])
            if sent <= offset:
                continue
            await self._obstacle(sent - len(each["tokens"]), cut)
            if self.failure and sent > self.failure[0]:
                error, self.failure = self.failure[1], None
                yield f"data: {json.dumps({'error': error})}\n\ndata: [DONE]\n\n"
                return
            text = self.contents[index] if self.contents else text_of([each])
            yield _event({"choices": [_choice(is_chat, text)], "speculation": each}, sent)
        yield _event({"choices": [{**_choice(is_chat, ""), "finish_reason": "stop"}]}, sent)
        yield _event({"choices": [], "usage": {"completion_tokens": sent}}, sent)
        yield "data: [DONE]\n\n"

    async def _obstacle(self, sent: int, cut: int | None) -> None:
        if cut is not None and sent >= cut:
            await self._cut.wait()
            self._cut.clear()
            raise ConnectionResetError("the test cuts the line here")
        if self.hold_after is not None and sent >= self.hold_after:
            try:
                await self._released.wait()
            except asyncio.CancelledError:
                self.left.set()
                raise


def _choice(is_chat: bool, text: str) -> dict[str, Any]:
    said = {"delta": {"content": text}} if is_chat else {"text": text}
    return {"index": 0, **said, "finish_reason": None}


def _event(chunk: dict[str, Any], sent: int) -> str:
    return f"id: session:{sent}\ndata: {json.dumps(chunk)}\n\n"


def _refusal(status: int, message: str) -> Response:
    error = {"message": message, "type": "authentication_error", "param": None, "code": "x"}
    return JSONResponse({"error": error}, status)


class OpenPage:
    """A page that is watched: what its console says, and where it calls."""

    def __init__(self, page: Page, address: str) -> None:
        """Watch from now on; the page is at `address`, such as http://127.0.0.1:8000."""
        self.page = page
        self._address = address
        self._faults: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self._faults.append(str(error)))
        page.on("request", lambda request: self._called(request.url))

    async def visit(self) -> None:
        """Open the page and wait until it says that the model is ready."""
        await self.page.goto(self._address)
        await expect(self.page.locator("#model-state")).to_have_text("ready")

    def check(self) -> None:
        """Fail for what went wrong."""
        assert not self._faults, self._faults

    def _heard(self, message: ConsoleMessage) -> None:
        # The browser itself notes failed calls; those are what some tests are about.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self._faults.append(message.text)

    def _called(self, url: str) -> None:
        if not url.startswith((self._address, "data:", "blob:")):
            self._faults.append(f"call to {url}")


async def send(page: Page, text: str) -> None:
    """Type a message, send it by the keyboard and wait for the end of its answer."""
    await page.locator("#text").fill(text)
    await page.locator("#text").press("Enter")
    await ended(page)


async def ended(page: Page) -> None:
    """Wait until nothing runs."""
    await expect(page.locator("#stop")).to_be_hidden()
    await expect(page.locator(".turn.running")).to_have_count(0)
