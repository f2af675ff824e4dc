"""An engine written in Python in a process of its own, asked by lines of JSON.

Engines in one process would share more than a machine: the interpreter's lock, the allocator, and
OpenMP, which lets threads sleep at every wait as soon as all that ever computed are more than there
are cores. This module knows no engine; the one to load is named by its module and class.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

from specinfer.errors import SpecinferError, Unavailable
from specinfer_bench.peers.peer import Answer, Arm, Pair, Peer, Task

MODULE = "specinfer_bench.peers.apart"
END_SECONDS = 30.0


class Apart:
    """A peer whose arms run in a process of their own.

    Args:
        kind: its class, which is made without arguments or with texts.
        arguments: of the class.
    """

    def __init__(self, kind: type[Any], *arguments: str) -> None:
        self._words = [_module_of(kind), kind.__qualname__, *arguments]
        self._peer: Peer = kind(*arguments)
        self.name = self._peer.name

    def missing(self) -> str | None:
        """What the peer says."""
        return self._peer.missing()

    @contextmanager
    def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
        """Its arms, loaded in a new process that ends with the block.

        Raises:
            Unavailable: when the peer does not load there, with what it raised.
        """
        command = [sys.executable, "-m", MODULE, _pair_text(pair), *self._words]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                arms = _heard(process, "arms")
                yield {
                    name: Arm(partial(_asked, process, name), **facts)
                    for name, facts in arms.items()
                }
            finally:
                assert process.stdin is not None
                with suppress(BrokenPipeError):  # it may have died meanwhile
                    process.stdin.close()
                try:
                    process.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()


def _module_of(kind: type[Any]) -> str:
    """The name that another process imports its module by, also where that is what runs here."""
    if kind.__module__ != "__main__":
        return kind.__module__
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "run the module by `python -m`"
    return spec.name


def _asked(process: subprocess.Popen[str], arm: str, task: Task) -> Answer:
    assert process.stdin is not None
    process.stdin.write(json.dumps({"arm": arm, "task": asdict(task)}) + "\n")
    process.stdin.flush()
    given = _heard(process, "answer")
    told = given.pop("token_ids")
    return Answer(token_ids=None if told is None else tuple(told), **given)


def _heard(process: subprocess.Popen[str], wanted: str) -> dict[str, Any]:
    """What the process says under a name; raises Unavailable when it is an error, or nothing."""
    assert process.stdout is not None
    said = json.loads(process.stdout.readline() or '{"error": "its process has ended"}')
    if "error" in said:
        raise Unavailable(said["error"])
    found: dict[str, Any] = said[wanted]
    return found


def _pair_text(pair: Pair) -> str:
    """The pair as JSON."""
    return json.dumps({**asdict(pair), "eos_token_ids": sorted(pair.eos_token_ids)}, default=str)


def _read_pair(text: str) -> Pair:
    values = json.loads(text)
    for name in ("target", "draft", "cache"):
        values[name] = Path(values[name])
    return Pair(**{**values, "eos_token_ids": frozenset(values["eos_token_ids"])})


def serve(peer: Peer, pair: Pair, questions: IO[str], answers: IO[str]) -> None:
    """Load a peer, say which arms it has, and run what is asked until nothing more is."""

    def say(**said: object) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    try:
        with peer.load(pair) as arms:
            say(arms={name: _facts(arm) for name, arm in arms.items()})
            for line in questions:
                asked = json.loads(line)
                try:
                    say(answer=asdict(arms[asked["arm"]].run(_read_task(asked["task"]))))
                except (SpecinferError, RuntimeError, ValueError, OSError) as error:
                    say(error=f"{type(error).__name__}: {error}")
    except (SpecinferError, RuntimeError, ValueError, OSError, ImportError) as error:
        say(error=f"{type(error).__name__}: {error}")


def _facts(arm: Arm) -> dict[str, bool]:
    return {"plain": arm.plain, "greedy_only": arm.greedy_only, "seeded": arm.seeded}


def _read_task(values: dict[str, Any]) -> Task:
    return Task(token_ids=tuple(values.pop("token_ids")), **values)


def main(words: Sequence[str]) -> None:
    """Serve the peer that the words name; what it prints itself goes to standard error."""
    pair, module, kind, *arguments = words
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        peer: Peer = getattr(importlib.import_module(module), kind)(*arguments)
        serve(peer, _read_pair(pair), sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
