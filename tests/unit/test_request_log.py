"""The log of requests is bounded, and each key finds its own."""

from __future__ import annotations

import pytest

from specinfer.errors import NotFound
from specinfer.messages import (
    Finished,
    RoundFacts,
    SpeculationSummary,
    Started,
    TokensEvent,
    Usage,
)
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
    entry.told(Finished("length", "", Usage(), SpeculationSummary()))
    entry.ended()
    report = log.find("long", "")
    assert report.outcome == "length"
    assert report.timings.queue_seconds == pytest.approx(0.5)
    assert report.timings.prepare_seconds == pytest.approx(0.1)
    assert report.timings.first_token_seconds == pytest.approx(0.7)
    assert report.timings.total_seconds == pytest.approx(now - 10.0)
    assert len(report.rounds) == MAX_ROUNDS
    assert report.rounds[-1].offset == MAX_ROUNDS + 4
    assert report.rounds[-1].seconds == pytest.approx(0.07)
    assert report.rounds[-1].start_seconds == pytest.approx(now - 10.0 - 0.07)


def test_all_requests_together_keep_a_bounded_number_of_rounds() -> None:
    log = RequestLog(max_rounds=25)
    for name in "abcd":
        entry = log.begin(name, "")
        log.keep(entry)
        for number in range(10):
            entry.add(TokensEvent(number, "x", (1,), 0, (), RoundFacts(number)))
    log.keep(log.begin("e", ""))
    with pytest.raises(NotFound):
        log.find("b", "")
    assert [len(log.find(name, "").rounds) for name in "cde"] == [10, 10, 0]


def test_rounds_of_a_forgotten_request_do_not_push_others_out() -> None:
    log = RequestLog(max_rounds=25)
    round_ = TokensEvent(0, "x", (1,), 0, (), RoundFacts(0))
    forgotten = [log.begin("same", "") for _ in range(2)]
    for entry in forgotten:
        log.keep(entry)
        for _ in range(10):
            entry.add(round_)
    log.keep(log.begin("same", ""))
    for entry in forgotten:
        for _ in range(50):
            entry.add(round_)
    other = log.begin("other", "")
    log.keep(other)
    for _ in range(20):
        other.add(round_)
    log.keep(log.begin("last", ""))
    assert len(log.find("same", "").rounds) == 0
    assert len(log.find("other", "").rounds) == 20


def test_a_request_ends_as_its_reader_was_told() -> None:
    log = RequestLog()
    left, failed = log.begin("left", ""), log.begin("failed", "")
    # Made, but nobody took it any more.
    left.add(Finished("stop", "", Usage(), SpeculationSummary()))
    left.ended()
    failed.failed(NotFound("gone"))
    failed.ended()
    assert (left.outcome, failed.outcome) == ("cancelled", "not_found")


def test_ids_of_answers_over_http_and_of_calls_with_several_choices_are_found() -> None:
    log = RequestLog()
    for number in range(2):
        entry = log.begin(f"call-{number}", "")
        log.keep(entry)
        entry.add(Started(f"call-{number}", f"session{number}", "m", 0, 3))
    assert log.find("call", "").request_id == "call-0"
    assert log.find("chatcmpl-session1", "").request_id == "call-1"
    assert log.find("resp_session1", "").request_id == "call-1"
    with pytest.raises(NotFound, match="chatcmpl-nobody"):
        log.find("chatcmpl-nobody", "")
