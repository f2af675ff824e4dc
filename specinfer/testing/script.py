"""What a fake router answers: replies, the sessions made of them, and their events.

Tokens are words and times are made up. This module knows nothing of gRPC.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from specinfer.completion import summary_of
from specinfer.errors import NotFound, SpecinferError
from specinfer.messages import (
    Capabilities,
    Finished,
    GenerateEvent,
    GenerateRequest,
    RequestReport,
    RoundDetail,
    RoundFacts,
    RoundReport,
    Started,
    Timings,
    TokenLogprob,
    TokensEvent,
    Usage,
)
from specinfer.tree import TokenTree

VOCABULARY = 50_000
MODEL_HASH = "a" * 64
RANDOM_SEED = 4242
MAX_SESSIONS = 1000
ROUND_SECONDS = 0.004


@dataclass(frozen=True)
class FakeReply:
    """What the fake answers to one request.

    Attributes:
        text: the completion; each word with the white space before it is one token.
        finish_reason: "stop" or "length"; a request's `max_tokens` and `stop` cut the text too.
        error: raised after `error_at` tokens, or None.
        error_at: tokens sent before `error`.
        break_at: token offsets at which the connection breaks, each one once.
        stall_at: token offset at which the stream falls silent, once, or None.
        delay: seconds before each round.
        round_size: tokens of a round, one of them the target's own; 1 where speculation is off.
    """

    text: str = ""
    finish_reason: str = "stop"
    error: SpecinferError | None = None
    error_at: int = 0
    break_at: tuple[int, ...] = ()
    stall_at: int | None = None
    delay: float = 0.0
    round_size: int = 3


def fake_capabilities(**changes: Any) -> Capabilities:
    """What the fake says of itself; `changes` are fields of Capabilities."""
    usual = Capabilities(
        model="fake",
        model_hash=MODEL_HASH,
        tokenizer_hash="b" * 64,
        vocab_size=VOCABULARY,
        dtype="float32",
        max_model_len=4096,
        max_tree_nodes=64,
        row_invariant=True,
        acceptance_rules=("match",),
        lossless=True,
        num_drafters=1,
        num_verifiers=1,
        chat=True,
        version="0",
        features=("resume", "cancel", "explain", "grammar", "tools", "prediction"),
        plain_round_seconds=0.01,
    )
    return replace(usual, **changes)


def words_of(text: str) -> list[str]:
    """The fake's tokens of a text: words with the white space before them."""
    return re.findall(r"\s*\S+|\s+", text)


@dataclass
class FakeSession:
    """A request that was taken, with what is left of its mishaps."""

    request: GenerateRequest
    started: Started
    reply: FakeReply
    words: list[str]
    stop_match: str
    breaks: list[int]
    stall: int | None
    offset: int = 0
    outcome: str = "running"
    rounds: list[RoundFacts] = field(default_factory=list)


class FakeStore:
    """Sessions of one fake router, or of several that share it: the last thousand."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[str, FakeSession] = OrderedDict()

    def add(self, session: FakeSession) -> None:
        """Keep a session."""
        self._sessions[session.started.session_id] = session
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)

    def find(self, name: str) -> FakeSession:
        """The session with an id, or of the request with one; raises NotFound."""
        for session in reversed(self._sessions.values()):
            if name in (session.started.session_id, session.started.request_id):
                return session
        raise NotFound(f"no session or request {name!r}")


def open_session(request: GenerateRequest, reply: FakeReply, number: int) -> FakeSession:
    """A session that will say the reply's text, as far as the request lets it."""
    seed = RANDOM_SEED if request.random_seed else request.sampling.seed
    request_id = request.request_id or f"request-{number}"
    prompt = request.prompt or "".join(m.content for m in request.messages or ())
    num_prompt = len(request.token_ids or words_of(prompt))
    started = Started(request_id, f"session-{request_id}", "fake", seed, num_prompt, MODEL_HASH)
    text, stop_match = reply.text, ""
    found = [(text.find(stop), stop) for stop in request.stop.stop if stop in text]
    if found:
        end, stop_match = min(found)
        text = text[:end]
    words = words_of(text)
    limit = request.stop.max_tokens
    if limit is not None and len(words) > limit:
        words, stop_match, reply = words[:limit], "", replace(reply, finish_reason="length")
    return FakeSession(
        request, started, reply, words, stop_match, sorted(reply.break_at), reply.stall_at
    )


async def play(session: FakeSession, offset: int) -> AsyncIterator[GenerateEvent]:
    """The events from a token on, with the mishaps that are due."""
    yield session.started
    size = session.reply.round_size if session.request.speculation.enabled else 1
    rounds: list[RoundFacts] = []
    while True:
        if session.outcome != "cancelled":
            await _mishap(session, offset)
        if session.outcome == "cancelled" or offset >= len(session.words):
            break
        if session.reply.delay:
            await asyncio.sleep(session.reply.delay)
        end = min([offset + size, len(session.words), *_ahead(session, offset)])
        event = _round_event(session, offset, end)
        rounds.append(event.round)
        session.rounds.append(event.round)
        offset = end
        session.offset = max(session.offset, offset)
        yield event
    if session.outcome != "cancelled":
        session.outcome = session.reply.finish_reason
    usage = Usage(session.started.num_prompt_tokens, offset, 0)
    timings = Timings(0.0, 0.001, ROUND_SECONDS, ROUND_SECONDS * len(rounds))
    yield Finished(session.outcome, session.stop_match, usage, summary_of(rounds), timings)


def _ahead(session: FakeSession, offset: int) -> list[int]:
    """Offsets further on at which something is to happen, so that rounds end there."""
    stall = () if session.stall is None else (session.stall,)
    error = () if session.reply.error is None else (session.reply.error_at,)
    return [at for at in (*session.breaks, *stall, *error) if at > offset]


async def _mishap(session: FakeSession, offset: int) -> None:
    if session.reply.error is not None and offset >= session.reply.error_at:
        raise session.reply.error
    if session.stall is not None and offset >= session.stall:
        session.stall = None
        await asyncio.Event().wait()
    if session.breaks and offset >= session.breaks[0]:
        session.breaks.pop(0)
        raise ConnectionResetError


def _round_event(session: FakeSession, start: int, end: int) -> TokensEvent:
    words = session.words[start:end]
    token_ids = tuple(zlib.crc32(word.encode()) % VOCABULARY for word in words)
    num_logprobs = session.request.num_logprobs
    logprobs: tuple[TokenLogprob, ...] = ()
    if num_logprobs is not None:
        logprobs = tuple(_logprob(token, num_logprobs) for token in token_ids)
    accepted = len(words) - 1
    reason = "" if session.request.speculation.enabled else "disabled"
    depth = max(accepted, 1) if not reason else 0
    facts = RoundFacts(
        end, depth, accepted, reason, 0.001, 0.002, 0.0, 0.0005, 0.0005, 0.0002, depth
    )
    detail = _detail(words, token_ids) if session.request.detail else None
    return TokensEvent(start, "".join(words), token_ids, accepted, logprobs, facts, detail)


def _detail(words: list[str], token_ids: tuple[int, ...]) -> RoundDetail:
    """A tree with nothing in it but what was confirmed."""
    tree = TokenTree.chain((0, *token_ids[:-1]))
    return RoundDetail(tree, tuple(range(1, len(tree))), ("", *words[:-1]), tuple(words))


def _logprob(token_id: int, count: int) -> TokenLogprob:
    top = tuple(((token_id + rank) % VOCABULARY, -0.5 - rank) for rank in range(count))
    return TokenLogprob(token_id, -0.5, top)


def report_of(session: FakeSession) -> RequestReport:
    offset, rounds = 0, []
    for number, facts in enumerate(session.rounds):
        num_tokens = facts.num_accepted_tokens + 1
        rounds.append(RoundReport(offset, num_tokens, ROUND_SECONDS * number, ROUND_SECONDS, facts))
        offset += num_tokens
    timings = Timings(0.0, 0.001, ROUND_SECONDS, ROUND_SECONDS * len(rounds))
    started = session.started
    return RequestReport(
        started.request_id,
        started.session_id,
        session.outcome,
        0.0,
        started.num_prompt_tokens,
        0,
        timings,
        tuple(rounds),
    )
