"""The log of requests is bounded, and each key finds its own."""

from __future__ import annotations

import pytest

from specinfer.errors import NotFound
from specinfer.messages import RoundFacts, Started, TokensEvent
from specinfer_router.request_log import MAX_ROUNDS, RequestLog


def test_the_oldest_requests_are_forgotten() -> None:
    log = RequestLog(max_requests=2)
    for name in ("a", "b", "c"):
        log.keep(log.begin(name, ""))
    with pytest.raises(NotFound):
        log.find("a", "")
    assert [log.find(name, "").request_id for name in ("b", "c")] == ["b", "c"]


def test_a_request_that_was_not_admitted_takes_no_place() -> None:
    log = RequestLog(max_requests=1)
    log.keep(log.begin("a", ""))
    log.begin("b", "")
    assert log.find("a", "").request_id == "a"
    with pytest.raises(NotFound):
        log.find("b", "")


def test_two_keys_may_use_the_same_id() -> None:
    log = RequestLog()
    for key_id in ("ann", "bob"):
        entry = log.begin("same", key_id)
        log.keep(entry)
        entry.add(Started("same", f"session-{key_id}", "m", 0, 3))
    assert log.find("same", "ann").session_id == "session-ann"
    assert log.find("session-bob", "bob").session_id == "session-bob"
    with pytest.raises(NotFound):
        log.find("session-bob", "ann")


def test_times_add_up_and_a_long_request_keeps_its_last_rounds() -> None:
    now = 10.0
    log = RequestLog(clock=lambda: now)
    entry = log.begin("long", "")
    log.keep(entry)
    now = 10.5
    entry.admitted(0.5)
    now = 10.6
    entry.add(Started("long", "s", "m", 0, 3))
    for round_number in range(MAX_ROUNDS + 5):
        now += 0.1
        facts = RoundFacts(round_number + 1, draft_seconds=0.02, verify_seconds=0.05)
        entry.add(TokensEvent(round_number, "x", (1,), 0, (), facts))
    entry.ended("length")
    report = log.find("long", "")
    assert report.timings.queue_seconds == pytest.approx(0.5)
    assert report.timings.prepare_seconds == pytest.approx(0.1)
    assert report.timings.first_token_seconds == pytest.approx(0.7)
    assert report.timings.total_seconds == pytest.approx(now - 10.0)
    assert len(report.rounds) == MAX_ROUNDS
    assert report.rounds[-1].offset == MAX_ROUNDS + 4
    assert report.rounds[-1].seconds == pytest.approx(0.07)
    assert report.rounds[-1].start_seconds == pytest.approx(now - 10.0 - 0.07)
