"""A completion ends at the right token and the right character, inside a round as well."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from specinfer_router.completion import Completion, Kept

LETTERS = dict(enumerate("abcdefghijklmnopqrstuvwxyz"))
EOS, STOP = 100, 101


class Letters:
    """Token 0 is "a", token 1 is "b"; the text of a capital comes one token late."""

    def __init__(self, late: str = "") -> None:
        self._late = late
        self._held = ""

    def push(self, token_id: int) -> str:
        text = self._held + LETTERS[token_id]
        self._held = text if text[-1] in self._late else ""
        return "" if self._held else text

    def push_all(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.push, token_ids))

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def completion_of(
    *, stops: tuple[str, ...] = (), max_tokens: int = 50, late: str = ""
) -> Completion:
    return Completion(
        Letters(late),
        stops=stops,
        stop_token_ids=frozenset({STOP}),
        eos_token_ids=frozenset({EOS}),
        max_tokens=max_tokens,
    )


def test_a_round_in_the_middle_is_kept_whole() -> None:
    completion = completion_of()
    assert completion.take([0, 1, 2]) == Kept((0, 1, 2), "abc")
    assert completion.take([3]) == Kept((3,), "d")
    assert (completion.num_tokens, completion.num_left) == (4, 46)


@pytest.mark.parametrize("max_tokens", [3, 7, 8, 50])
@pytest.mark.parametrize("end", [3, STOP, EOS])
def test_a_round_at_once_is_the_same_as_token_by_token(max_tokens: int, end: int) -> None:
    rounds = ([0, 1, 2], [4], [end, 2, 1, 0], [5, 6])
    whole = completion_of(max_tokens=max_tokens, late="cd")
    single = completion_of(max_tokens=max_tokens, late="cd")
    for token_ids in rounds:
        kept, pieces = whole.take(token_ids), []
        for token_id in token_ids:
            pieces.append(single.take([token_id]))
            if pieces[-1].finish_reason:
                break
        assert kept.token_ids == tuple(piece.token_ids[0] for piece in pieces)
        assert kept.text == "".join(piece.text for piece in pieces)
        assert (kept.finish_reason, kept.stop_match) == (
            pieces[-1].finish_reason,
            pieces[-1].stop_match,
        )
        assert whole.num_tokens == single.num_tokens
        if kept.finish_reason:
            return


def test_the_end_token_is_kept_and_has_no_text() -> None:
    assert completion_of().take([0, EOS, 2]) == Kept((0, EOS), "a", "stop")


def test_a_stop_token_is_named() -> None:
    assert completion_of().take([0, STOP, EOS]) == Kept((0, STOP), "a", "stop", "101")


def test_the_most_tokens_cut_inside_a_round() -> None:
    completion = completion_of(max_tokens=3)
    assert completion.take([0, 1]) == Kept((0, 1), "ab")
    assert completion.take([2, 3, 4]) == Kept((2,), "c", "length")


def test_an_end_token_at_the_last_place_is_a_stop() -> None:
    assert completion_of(max_tokens=2).take([0, EOS, 1]) == Kept((0, EOS), "a", "stop")


def test_a_stop_string_over_rounds_keeps_its_tokens_and_hides_its_text() -> None:
    completion = completion_of(stops=("cde",))
    assert completion.take([0, 1, 2]) == Kept((0, 1, 2), "ab")
    assert completion.take([3, 4, 5, 6]) == Kept((3, 4), "", "stop", "cde")


def test_what_was_held_for_a_stop_string_is_shown_when_it_does_not_come() -> None:
    completion = completion_of(stops=("cde",))
    assert completion.take([2, 3]) == Kept((2, 3), "")
    assert completion.take([0]) == Kept((0,), "cda")


@pytest.mark.parametrize("end", ["eos", "length"])
def test_held_text_is_shown_at_the_end(end: str) -> None:
    completion = completion_of(stops=("cde",), max_tokens=2 if end == "length" else 50)
    kept = completion.take([2, 3] if end == "length" else [2, 3, EOS])
    assert kept.text == "cd"
    assert kept.finish_reason == ("length" if end == "length" else "stop")


@pytest.mark.parametrize(("token_ids", "max_tokens"), [([1, 2], 2), ([1, 2, EOS], 9)])
def test_text_freed_at_the_end_may_complete_a_stop_string(
    token_ids: list[int], max_tokens: int
) -> None:
    completion = completion_of(stops=("bc",), late="c", max_tokens=max_tokens)
    assert completion.take(token_ids) == Kept(tuple(token_ids), "", "stop", "bc")
