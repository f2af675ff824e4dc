"""What working beside each other brings: tokens a second with it and without, in turn.

    python -m specinfer_bench.overlap --rounds 3 --output overlap.json

Three overlaps, each switched off and on: the next propose beside the store's commit, drafting
beside verifying, and passes that wait for sessions which are due. The router and both engines are
the real ones, in one process; passes and commits are waits of a stated length. The tokens of both
arms are compared with those that the target's rule gives. This module knows nothing of models.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from specinfer.errors import SpecinferError
from specinfer.messages import GenerateRequest, TokensEvent
from specinfer.sampling import SamplingParams, StopConditions
from specinfer_bench.cluster_report import write_report
from specinfer_bench.machine import machine_facts
from specinfer_bench.simulated_workers import FIRST_TOKEN
from specinfer_bench.spread import spread
from specinfer_bench.stated_engines import CHAIN, World, right_tokens, stated_router
from specinfer_router.router import Router

MODULE = "specinfer_bench.overlap"
TOKENS = 64
PROMPT_TOKENS = 8
STAGGER_SECONDS = 0.01


@dataclass(frozen=True)
class Overlap:
    """One thing beside another, and what it is compared with.

    Attributes:
        sessions: sessions at once.
        off, on: the world without and with it.
    """

    sessions: int
    off: World
    on: World


def _overlap(sessions: int, world: World, **switched: bool) -> Overlap:
    """The same world with a switch off and on."""
    (name,) = switched
    return Overlap(sessions, replace(world, **{name: False}), replace(world, **{name: True}))


OVERLAPS = {
    "propose beside the commit": _overlap(1, World(commit_seconds=0.005), beside=True),
    "drafting ahead": _overlap(1, World(), ahead=True),
    "passes that wait, 2 sessions": _overlap(2, World(draft_seconds=0.002), gathers=True),
}


@dataclass(frozen=True)
class Turn:
    """One arm's run.

    Attributes:
        tokens_per_second: of all sessions together. Rounds would not do: worse guesses make more.
        num_rounds: that they took.
        right: whether every session had the target's tokens.
    """

    tokens_per_second: float
    num_rounds: int
    right: bool


def run_turn(world: World, sessions: int, tokens: int = TOKENS) -> Turn:
    """All sessions of a world at once, to their ends."""
    with stated_router(world) as router:
        return asyncio.run(_run_sessions(router, sessions, tokens))


async def _run_sessions(router: Router, sessions: int, tokens: int) -> Turn:
    begun = time.perf_counter()
    # Begun together they would share every pass for ever, which those of a cluster do not.
    found = await asyncio.gather(
        *(_run_session(router, at, STAGGER_SECONDS * at, tokens) for at in range(sessions))
    )
    seconds = time.perf_counter() - begun
    return Turn(
        sum(len(told) for _, told in found) / seconds,
        sum(rounds for rounds, _ in found),
        all(told == right_tokens(_prompt(at)[-1], tokens) for at, (_, told) in enumerate(found)),
    )


def _prompt(session: int) -> tuple[int, ...]:
    return tuple(FIRST_TOKEN + session + at for at in range(PROMPT_TOKENS))


async def _run_session(router: Router, at: int, delay: float, tokens: int) -> tuple[int, list[int]]:
    """How many rounds a session took, and its tokens."""
    await asyncio.sleep(delay)
    request = GenerateRequest(
        token_ids=_prompt(at),
        sampling=SamplingParams(temperature=0.0),
        stop=StopConditions(max_tokens=tokens, ignore_eos=True),
    )
    rounds, told = 0, list[int]()
    async for event in router.generate(request):
        if isinstance(event, TokensEvent):
            rounds += 1
            told.extend(event.token_ids)
    return rounds, told


def compare(overlap: Overlap, turns: int, tokens: int = TOKENS) -> dict[str, object]:
    """Both arms in turn, the first one alternating, after a turn of each that does not count.

    Raises:
        SpecinferError: an arm's tokens are not the target's.
    """
    arms: dict[str, tuple[World, list[Turn]]] = {"off": (overlap.off, []), "on": (overlap.on, [])}
    for at in range(-1, turns):
        for name in ("off", "on") if at % 2 else ("on", "off"):
            world, runs = arms[name]
            found = run_turn(world, overlap.sessions, tokens)
            if not found.right:
                raise SpecinferError(f"the arm {name} of {overlap} has other tokens")
            if at >= 0:
                runs.append(found)
    off, on = ([run.tokens_per_second for run in runs] for _, runs in arms.values())
    return {
        "verify pass, ms": 1e3 * overlap.on.verify_seconds,
        "draft pass, ms": 1e3 * overlap.on.draft_seconds,
        "commit, ms": 1e3 * overlap.on.commit_seconds,
        "tokens a second, off": round(statistics.median(off), 2),
        "tokens a second, on": round(statistics.median(on), 2),
        **{
            f"rounds, {name}": statistics.median(run.num_rounds for run in runs)
            for name, (_, runs) in arms.items()
        },
        "on over off": asdict(spread([b / a for a, b in zip(off, on, strict=True)])),
        "identical": True,
    }


def overlap_parser() -> argparse.ArgumentParser:
    """Arguments of this benchmark."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each arm that count")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    return parser


def main(given: Sequence[str] | None = None) -> int:
    """Compare all, print the report and write it."""
    arguments, before = overlap_parser().parse_args(given), os.getloadavg()[0]
    setup = {
        "command": f"python -m {MODULE} " + shlex.join(sys.argv[1:]),
        "machine": machine_facts(),
        "load_average": before,
    }
    report = {
        "guesses": CHAIN.max_nodes,
        "acceptance": World.acceptance,
        "overlaps": {name: compare(each, arguments.rounds) for name, each in OVERLAPS.items()},
        "setup": setup,
    }
    write_report(report, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
