"""Load against speculation: off, on with one tree, and chosen by cost, in turn on one cluster.

Each cell keeps a number of sessions busy with the same requests and takes the speed of them all
together. The arms of a cell run one after the other and their order turns, so that a machine whose
speed wanders is fair to all; all cells get a turn before any gets another; ratios are taken turn by
turn. One tree is there to compare with and runs in the first turn alone. This module starts
nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from specinfer.errors import InternalError, InvalidRequest
from specinfer_bench.load.arrivals import Arrival
from specinfer_bench.load.asking import BY_COST, OFF, STATIC
from specinfer_bench.load.closed_loop import run_closed_loop
from specinfer_bench.load.observation import DONE, Observation
from specinfer_bench.load.open_loop import MAX_SESSIONS, Ask
from specinfer_bench.load.summary import Percentiles, percentiles

ARMS = (OFF, STATIC, BY_COST)
GOAL_ANY_LOAD = 0.97
GOAL_LOW_LOAD = 1.5
LOW_LOAD_SESSIONS = 4
MIN_REQUESTS = 4


@dataclass(frozen=True)
class SweepOptions:
    """What is swept.

    Attributes:
        sessions: numbers of sessions at once, a cell each.
        requests_a_session: requests that each session gets on average, at least 2; no cell has
            fewer than MIN_REQUESTS in all.
        max_tokens: tokens of each answer.
        repeats: most turns of each cell.
        max_seconds: no further turn of a cell begins that would not end within so long of the
            sweep's beginning; one always runs.
        seed: of the first request.

    Raises:
        InvalidRequest: naming the option that is out of its range.
    """

    sessions: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    requests_a_session: int = 2
    max_tokens: int = 64
    repeats: int = 3
    max_seconds: float = math.inf
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.sessions or not all(1 <= each <= MAX_SESSIONS for each in self.sessions):
            raise InvalidRequest(f"sessions are 1 to {MAX_SESSIONS}", field="sessions")
        if self.requests_a_session < 2:
            # With one each, no session ever follows another.
            raise InvalidRequest("requests a session are at least 2", field="requests_a_session")
        for name in ("max_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is at least 1", field=name)


@dataclass(frozen=True)
class ArmCell:
    """One arm at one number of sessions.

    Attributes:
        tokens_per_second: of all sessions together, median over the turns.
        ratio: that speed over the speed without speculation of the same turn, median; and the
            smallest and largest of them.
        tokens_per_event: tokens that a round brought, on average.
        first_token_ms, token_ms: of all requests.
    """

    tokens_per_second: float
    ratio: float
    ratio_min: float
    ratio_max: float
    tokens_per_event: float
    first_token_ms: Percentiles
    token_ms: Percentiles


@dataclass(frozen=True)
class Cell:
    """All arms at one number of sessions.

    Attributes:
        requests: requests of one turn of an arm.
        turns: times that it ran; one tree ran in the first of them.
        identical: whether every request gave the same tokens in every arm and turn.
    """

    sessions: int
    requests: int
    turns: int
    identical: bool
    arms: Mapping[str, ArmCell]


@dataclass(frozen=True)
class SweepReport:
    """The cells, and what they say about the goals.

    Attributes:
        lowest_by_cost: smallest ratio of the arm chosen by cost, over all cells.
        lowest_by_cost_low_load: smallest of those at up to LOW_LOAD_SESSIONS sessions, or None.
        identical: whether no output differed anywhere.
    """

    cells: tuple[Cell, ...]
    goal_any_load: float
    goal_low_load: float
    lowest_by_cost: float
    lowest_by_cost_low_load: float | None
    identical: bool


@dataclass(frozen=True)
class _Turn:
    """What one arm gave in one turn of a cell."""

    observations: list[Observation]

    @property
    def speed(self) -> float:
        """Tokens a second of all requests together, from the first one sent to the last one ended.

        Of any shorter stretch the edges decide: sessions in step bring many tokens at a time, an
        arm of few large rounds loses up to one of them, and prompts weigh more or less.
        """
        tokens = sum(seen.num_tokens for seen in self.observations)
        return tokens / max(seen.ended for seen in self.observations)

    @property
    def tokens(self) -> list[list[int]]:
        """Of every request."""
        return [seen.token_ids for seen in self.observations]


@dataclass
class _Cell:
    """A number of sessions, and what its arms gave so far, in how many seconds."""

    sessions: int
    requests: list[Arrival]
    turns: dict[str, list[_Turn]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    seconds: float = 0.0

    @property
    def num_turns(self) -> int:
        """Times that it ran."""
        return len(self.turns[OFF])

    def ends_by(self, seconds: float) -> bool:
        """Whether another turn, no longer than those before, is over by then; the first one is."""
        return not self.num_turns or self.seconds / self.num_turns <= seconds


async def run_sweep(
    asks: Mapping[str, Ask],
    prompts: Sequence[str],
    options: SweepOptions,
    progress: Callable[[str], None] = lambda _: None,
) -> SweepReport:
    """Run all cells.

    Args:
        asks: how to ask, by arm: one for each of ARMS.
        prompts: questions; a cell takes them in turn.
        options: what is swept.
        progress: told of each turn.

    Raises:
        InternalError: when a request fails: speeds of unequal work are not compared.
    """
    loop = asyncio.get_running_loop()
    begun = loop.time()
    cells = [
        _Cell(sessions, _requests(prompts, sessions, options)) for sessions in options.sessions
    ]
    for _ in range(options.repeats):
        for cell in cells:
            turn_begun = loop.time()
            if cell.ends_by(options.max_seconds - (turn_begun - begun)):
                await _one_turn(cell, asks, progress)
                cell.seconds += loop.time() - turn_begun
    return _report([_summed(cell) for cell in cells])


async def _one_turn(cell: _Cell, asks: Mapping[str, Ask], progress: Callable[[str], None]) -> None:
    """Run each of the turn's arms once."""
    turn = cell.num_turns
    if turn == 0:
        # Prefix caches and lazy set-up: every arm finds the same.
        await _turn(asks[OFF], _short(cell.requests), cell.sessions)
    for arm in _arms(turn):
        found = await _turn(asks[arm], cell.requests, cell.sessions)
        cell.turns[arm].append(found)
        progress(f"{cell.sessions} sessions, {arm}: {found.speed:.1f} tokens/s")


def _arms(turn: int) -> Sequence[str]:
    """All in the first turn, then those that the goals are about, in changing order."""
    if turn == 0:
        return ARMS
    return (BY_COST, OFF) if turn % 2 else (OFF, BY_COST)


def _requests(prompts: Sequence[str], sessions: int, options: SweepOptions) -> list[Arrival]:
    number = max(MIN_REQUESTS, sessions * options.requests_a_session)
    return [
        Arrival(0.0, prompts[index % len(prompts)], options.max_tokens, options.seed + index)
        for index in range(number)
    ]


def _short(requests: Sequence[Arrival]) -> list[Arrival]:
    unique = {request.prompt: request for request in requests}
    return [Arrival(0.0, prompt, 2, each.seed) for prompt, each in unique.items()]


async def _turn(ask: Ask, requests: Sequence[Arrival], sessions: int) -> _Turn:
    observations = await run_closed_loop(requests, ask, sessions)
    failed = [seen for seen in observations if seen.outcome != DONE]
    if failed:
        raise InternalError(f"{len(failed)} of {len(observations)} failed: {failed[0].error}")
    return _Turn(observations)


def _summed(cell: _Cell) -> Cell:
    turns = cell.turns
    reference = turns[OFF][0].tokens
    plain = [turn.speed for turn in turns[OFF]]
    return Cell(
        cell.sessions,
        requests=len(reference),
        turns=cell.num_turns,
        identical=all(turn.tokens == reference for arm in ARMS for turn in turns[arm]),
        arms={arm: _arm_cell(plain, turns[arm]) for arm in ARMS},
    )


def _arm_cell(plain: Sequence[float], turns: Sequence[_Turn]) -> ArmCell:
    speeds = [turn.speed for turn in turns]
    ratios = [speed / base for speed, base in zip(speeds, plain[: len(speeds)], strict=True)]
    seen = [one for turn in turns for one in turn.observations]
    return ArmCell(
        tokens_per_second=median(speeds),
        ratio=median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        tokens_per_event=sum(one.num_tokens for one in seen)
        / max(1, sum(len(one.events) for one in seen)),
        first_token_ms=percentiles(one.first_token_seconds for one in seen),
        token_ms=percentiles(one.token_seconds for one in seen),
    )


def _report(cells: Sequence[Cell]) -> SweepReport:
    by_cost = {cell.sessions: cell.arms[BY_COST].ratio for cell in cells}
    low = [ratio for sessions, ratio in by_cost.items() if sessions <= LOW_LOAD_SESSIONS]
    return SweepReport(
        cells=tuple(cells),
        goal_any_load=GOAL_ANY_LOAD,
        goal_low_load=GOAL_LOW_LOAD,
        lowest_by_cost=min(by_cost.values()),
        lowest_by_cost_low_load=min(low) if low else None,
        identical=all(cell.identical for cell in cells),
    )
