"""What a router has seen of its drafters: how often they are right, and what a level costs.

All sessions share it, it forgets what is old, and nothing of it is kept on disk. This module knows
nothing of shapes, workers or the wire.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from specinfer.messages import StepCost
from specinfer.step_curve import StepCurve
from specinfer.tree import TokenTree
from specinfer_router.crowd import Places
from specinfer_router.live_costs import LiveCosts, MovingAverage

MAX_LEVELS = 8
MAX_RANKS = 4
# What is believed of a drafter before its first tree: good enough to be tried.
PRIOR = (0.7, 0.1, 0.04, 0.02)
PRIOR_TRIALS = 12.0
# A level leans on the others as if they were so many trials of its own.
POOLED_TRIALS = 16.0
MEMORY_TRIALS = 256.0
KEPT_TRIAL = 1.0 - 1.0 / MEMORY_TRIALS
MOST_ACCEPTED = 0.99
# Costs: how much of the past a new answer leaves, and what a pause leaves of it.
KEPT = 0.95
KEPT_AFTER_PAUSE = 0.5
SLOPE_TRUST = 1.0
CLEAR_SPREAD = 4.0
SNAPSHOT_ROUNDS = 32
MAX_RECORDS = 32
MAX_TEMPERATURE_STEPS = 4

Acceptance = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Acceptance at one moment; what is made of it may be kept for as long as it is the same one.

    Attributes:
        acceptance: P[depth - 1][rank], falling with the rank, a row at most MOST_ACCEPTED in sum.
        overall: how often any guess is right below a confirmed node.
    """

    acceptance: Acceptance
    overall: float


class AcceptanceCounts:
    """How often the child of each rank was the one confirmed, by depth.

    Only children of confirmed nodes are counted, so that a deep level is not blamed for what went
    wrong above it (survivor bias). Row 0 counts all depths together.
    """

    def __init__(self) -> None:
        self._trials = [[0.0] * MAX_RANKS for _ in range(MAX_LEVELS + 1)]
        self._hits = [[0.0] * MAX_RANKS for _ in range(MAX_LEVELS + 1)]
        self._trials[0] = [PRIOR_TRIALS] * MAX_RANKS
        self._hits[0] = [PRIOR_TRIALS * chance for chance in PRIOR]
        self._num_levels, self._num_right = PRIOR_TRIALS, PRIOR_TRIALS * sum(PRIOR)

    def observe(
        self, tree: TokenTree, accepted: Sequence[int], num_draft_nodes: int, weight: int = 1
    ) -> list[bool]:
        """Count one round; returns for each level that was reached whether a guess was right.

        Args:
            tree: what was verified.
            accepted: confirmed nodes below the root, in order.
            num_draft_nodes: nodes that the drafter brought, root included; later ones are not its.
            weight: as how many such rounds it counts.
        """
        children = _children(tree.parents, num_draft_nodes)
        outcomes: list[bool] = []
        parent = 0
        for node in (*accepted, -1):
            siblings = children.get(parent)
            if not siblings:
                # A drafter that answers without any guess was not right either.
                if parent == 0:
                    self._count(1, 1, -1, weight)
                    outcomes.append(False)
                break
            rank = siblings.index(node) if node in siblings else -1
            self._count(len(outcomes) + 1, min(len(siblings), MAX_RANKS), rank, weight)
            outcomes.append(rank >= 0)
            if rank < 0:
                break
            parent = node
        return outcomes

    def _count(self, depth: int, num_ranks: int, hit: int, weight: int) -> None:
        keep, level = KEPT_TRIAL**weight, min(depth, MAX_LEVELS)
        self._num_levels = keep * self._num_levels + weight
        self._num_right = keep * self._num_right + weight * (hit >= 0)
        for trials, hits in (
            (self._trials[0], self._hits[0]),
            (self._trials[level], self._hits[level]),
        ):
            for rank in range(num_ranks):
                trials[rank] = keep * trials[rank] + weight
                hits[rank] = keep * hits[rank] + weight * (rank == hit)

    def snapshot(self) -> Snapshot:
        """The chances now: a level that was seldom reached leans on all levels together."""
        pooled = [
            hits / trials for hits, trials in zip(self._hits[0], self._trials[0], strict=True)
        ]
        rows = tuple(
            _falling(
                (hits + POOLED_TRIALS * chance) / (trials + POOLED_TRIALS)
                for hits, trials, chance in zip(
                    self._hits[level], self._trials[level], pooled, strict=True
                )
            )
            for level in range(1, MAX_LEVELS + 1)
        )
        return Snapshot(rows, self._num_right / self._num_levels)


class DraftCost:
    """What a propose takes: a fixed part and a part for each level, by decayed least squares.

    Both parts are needed: a probe of one level pays the whole fixed part, and a deep tree would
    look dear if that were taken for the price of a level.

    Attributes:
        known_level: what a drafter measured of one of its passes, 0 when it is not known.
    """

    def __init__(self, level_seconds: float = 0.0) -> None:
        """Begin with what a drafter measured of one of its passes, or 0 when it is not known."""
        self.known_level = level_seconds
        # Decayed sums of 1, levels, seconds, levels squared and levels times seconds.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        # Remembered from when trees were of many depths, for probes are all of one.
        self._learnt_level = level_seconds

    def observe(self, levels: int, seconds: float, *, after_pause: bool) -> None:
        """Take in a tree of `levels` levels that came after `seconds`."""
        # What was known before a pause is old: one slow answer must not silence a drafter for long.
        keep = KEPT_AFTER_PAUSE if after_pause else KEPT
        one, two, three, four, five = self._sums
        one, two, three = keep * one + 1.0, keep * two + levels, keep * three + seconds
        four, five = keep * four + levels * levels, keep * five + levels * seconds
        self._sums = (one, two, three, four, five)
        if four - two * two / one > CLEAR_SPREAD:
            self._learnt_level = self.parts()[1]

    def seconds(self, levels: int) -> float:
        """Of a tree of `levels` levels."""
        fixed, level = self.parts()
        return fixed + levels * level

    def parts(self) -> tuple[float, float]:
        """Fixed seconds and seconds for each level; what is not known costs nothing."""
        weight, levels, seconds, squares, products = self._sums
        if not weight:
            return 0.0, self.known_level
        mean_levels, mean_seconds = levels / weight, seconds / weight
        # While all trees are as deep the slope is a belief: at most the share of a level.
        believed = min(self._learnt_level or math.inf, mean_seconds / mean_levels)
        slope = products - levels * mean_seconds + SLOPE_TRUST * believed
        level = max(0.0, slope / (max(0.0, squares - levels * mean_levels) + SLOPE_TRUST))
        level = min(level, mean_seconds / mean_levels)
        return mean_seconds - level * mean_levels, level


class DrafterRecord:
    """What is known of one drafter, under one way of drawing tokens.

    Attributes:
        cost: what its answers take, to one session at a time.
        snapshot: its acceptance, made anew now and then.
        num_idle_rounds: rounds planned without a guess since the last one with a guess.
        num_busy_rounds: rounds planned with guesses, not to probe, since the last one without.
        num_vain_probes: probes since speculation last paid.
        num_vain_starts: times since then that it began and was given up soon after.
        crowd: most sessions at once since those two were counted.
    """

    def __init__(self, costs: Sequence[StepCost] = ()) -> None:
        """Begin with what the drafter measured of its passes, or nothing."""
        self._curve = StepCurve(costs)
        self._alone = self._curve.at(1)
        # Of how many sessions it was told last, and what; mostly it is the same number again.
        self._slowness = (1, 1.0)
        self.cost = DraftCost(self._alone if costs else 0.0)
        self.num_idle_rounds = self.num_busy_rounds = 0
        self.num_vain_probes = self.num_vain_starts = self.crowd = 0
        self._counts = AcceptanceCounts()
        self._num_rounds, self._next_snapshot = 0, 1
        self.snapshot = self._counts.snapshot()

    def slowness(self, num_sessions: int) -> float:
        """How much longer a level takes to so many sessions at once than to one."""
        if num_sessions <= 1:
            return 1.0
        if self._slowness[0] != num_sessions:
            slowness = max(1.0, self._curve.at(num_sessions) / self._alone)
            self._slowness = num_sessions, slowness
        return self._slowness[1]

    def observe(
        self,
        tree: TokenTree,
        accepted: Sequence[int],
        num_draft_nodes: int,
        *,
        num_sessions: int = 1,
        weight: int = 1,
        after_pause: bool = False,
    ) -> list[bool]:
        """Count a round's tree, one of `num_sessions`; see `AcceptanceCounts.observe`."""
        outcomes = self._counts.observe(tree, accepted, num_draft_nodes, weight)
        self._num_rounds += 1
        # Soon at first, for the prior is a guess; then as often as the tables are worth: each new
        # one makes the choices of all sessions anew. What a probe found is wanted at once.
        if after_pause or self._num_rounds >= self._next_snapshot:
            wait = min(self._num_rounds, SNAPSHOT_ROUNDS * num_sessions)
            self._next_snapshot = self._num_rounds + wait
            self.snapshot = self._counts.snapshot()
        return outcomes


class Calibration:
    """What a router has measured, shared by all of its sessions.

    Attributes:
        costs: what the target's passes cost.
        overhead_seconds: what the way to the target and back takes beside its passes and queue.
        num_passes: passes seen, each session's share of its own; what is made of the costs is worth
            making again now and then.
        places: where in a crowd each session begins to count.
    """

    def __init__(
        self, costs: StepCurve, draft_costs: Callable[[], Sequence[StepCost]] = tuple
    ) -> None:
        """Begin with what workers measured of themselves.

        Args:
            costs: of the target.
            draft_costs: asked for those of a drafter, when one is first planned with.
        """
        self.costs = LiveCosts(costs)
        self.overhead_seconds = MovingAverage(0.0, weight=0.05)
        self.num_passes = 0.0
        self.places = Places()
        self._draft_costs = draft_costs
        self._records: OrderedDict[tuple[str, int], DrafterRecord] = OrderedDict()
        self._newest = ""
        # What was asked for last: mostly it is the same one again.
        self._asked, self._found = ("", -1.0), DrafterRecord()

    def record(self, drafter: str, temperature: float) -> DrafterRecord:
        """What is known of a drafter; "" is whichever was heard of last.

        Greedy and sampled text are kept apart, and so are temperatures, in steps of a half: a rank
        that is never taken greedily is worth a node when tokens are drawn.
        """
        self._newest = drafter or self._newest
        asked = (self._newest, temperature)
        if asked != self._asked:
            step = min(MAX_TEMPERATURE_STEPS, math.ceil(2 * temperature))
            self._asked, self._found = asked, self._find((self._newest, step))
        return self._found

    def _find(self, key: tuple[str, int]) -> DrafterRecord:
        found = self._records.get(key)
        if found is None:
            found = self._records[key] = DrafterRecord(self._draft_costs())
        self._records.move_to_end(key)
        while len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)
        return found

    def observe_pass(
        self,
        num_rows: int,
        context_len: int,
        seconds: float,
        *,
        share: float,
        overhead_seconds: float,
    ) -> None:
        """Take in a pass that was no prefill, and what the way there and back took.

        Args:
            num_rows: rows of the pass.
            context_len: keys that each of them saw, or nearly.
            seconds: the worker's compute.
            share: part of the rows that were the session's own; the others tell of it too.
            overhead_seconds: round trip less compute and queue.
        """
        # As many sessions tell of a pass as were in it.
        self.num_passes += share
        self.costs.observe(num_rows, context_len, seconds, share)
        # A pass that began before it was asked for says nothing of the way.
        if overhead_seconds > 0.0:
            self.overhead_seconds.observe(overhead_seconds)


def shift_acceptance(acceptance: Acceptance, shift: float) -> Acceptance:
    """Every depth's chance that any guess is right moved by `shift` in log odds, ranks in step."""
    if not shift:
        return acceptance
    factor, shifted = math.exp(shift), []
    for row in acceptance:
        total = sum(row)
        moved = total * factor / (1.0 - total + total * factor)
        shifted.append(tuple(chance * moved / total for chance in row) if total else row)
    return tuple(shifted)


@lru_cache(maxsize=256)
def _children(parents: tuple[int, ...], num_nodes: int) -> dict[int, tuple[int, ...]]:
    """The children of each of the first `num_nodes` nodes that has any; trees are of few shapes."""
    found: dict[int, list[int]] = {}
    for node in range(1, num_nodes):
        found.setdefault(parents[node], []).append(node)
    return {parent: tuple(nodes) for parent, nodes in found.items()}


def _falling(chances: Iterable[float]) -> tuple[float, ...]:
    """Chances that fall with the rank and sum to MOST_ACCEPTED at most.

    Lower ranks are measured where the drafter was unsure enough to offer them, so that the sum of
    the measured chances may be more than one.
    """
    found: list[float] = []
    left = MOST_ACCEPTED
    for chance in chances:
        found.append(min(chance, left, *found[-1:]))
        left -= found[-1]
    return tuple(found)
