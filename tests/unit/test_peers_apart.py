"""An engine in a process of its own answers as it would here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from specinfer.errors import Unavailable
from specinfer_bench.peers.apart import Apart
from specinfer_bench.peers.peer import Answer, Pair, Task
from tests.kit.fake_peer import FakePeer

TASK = Task("hi", (1, 2), max_tokens=16, temperature=0.5, seed=3)
PAIR = Pair(Path("t"), Path("d"), "float32", 7, frozenset({4, 5}), Path("cache"))


def test_arms_are_run_in_the_process_and_an_error_ends_no_more_than_its_run() -> None:
    apart = Apart(FakePeer)
    assert (apart.name, apart.missing()) == ("fake", None)
    with apart.load(PAIR) as arms:
        echo, silent, broken = arms["echo"], arms["silent"], arms["broken"]
        assert (echo.plain, echo.seeded, broken.greedy_only, silent.plain) == (
            (True, True, True, False)
        )
        with pytest.raises(Unavailable, match="it broke"):
            broken.run(TASK)
        assert echo.run(TASK) == Answer(2, 0.5, (1, 2, 7), 0.25)
        assert silent.run(TASK) == Answer(3, 1.5)
    with pytest.raises((Unavailable, ValueError)):
        echo.run(TASK)


def test_what_does_not_load_there_says_why() -> None:
    with (
        pytest.raises(Unavailable, match="no such model"),
        Apart(FakePeer, "no such model").load(PAIR),
    ):
        pass


def test_a_class_of_the_module_that_runs_is_found_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = FakePeer.__module__
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name=name))
    monkeypatch.setattr(FakePeer, "__module__", "__main__")
    with Apart(FakePeer).load(PAIR) as arms:
        assert arms["echo"].run(TASK).token_ids == (1, 2, 7)
