"""The tree that promises most tokens a second, no tree included: SmartSpec's goodput over
Sequoia's trees (arXiv 2406.14066; arXiv 2402.12374, section 3).

This module knows nothing of links, tokens or who asks.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self
from weakref import WeakSet

from specinfer.messages import ShapeQuery, SpeculationOptions
from specinfer_router.calibration import (
    MAX_LEVELS,
    MOST_ACCEPTED,
    Acceptance,
    Calibration,
    DrafterRecord,
    shift_acceptance,
)
from specinfer_router.crowd import CROWD, RecentMost
from specinfer_router.plain_pace import tokens_within
from specinfer_router.policy import is_root_alone, requested
from specinfer_router.round_history import RoundHistory, RoundLoad
from specinfer_router.sequoia import TokenTable, expected_tokens

PROBE_ROUNDS = 16
# Share of the time that may go into probes for long.
PROBE_SHARE = 0.01
START_MARGIN = 0.1
STAY_MARGIN = 0.03
# Choices and tables kept; both are made again when they are missing.
MAX_CHOICES = 1024
MAX_TABLES = 64
MAX_NODES = 255
# Deepest tree looked at: the tables of deeper ones take long, and their leaves are worth nothing.
MAX_DEPTH = 16
# What a drafter that is never wrong would have.
ALWAYS_RIGHT: Acceptance = ((MOST_ACCEPTED,),)
# Passes after which a choice is made again, for what passes cost is learnt from them.
PASSES_A_CHOICE = 32
# Costs and contexts that differ by less than this share of an octave make the same choice.
STEPS_AN_OCTAVE = 6
SHIFT_STEP = 0.5
# Less than this share of a pass decides nothing, and is noise where a cost is learnt from answers.
LEAST_SHARE = 1 / 64
# Steps of contexts and draft seconds that make the same choice for them.
STEPS_OF_A_CROWD = 6
# Rounds of every session after which speculation that began was no vain start.
LASTING_ROUNDS = 16
MOST_VAIN_STARTS = 8


@dataclass(frozen=True)
class RoundCosts:
    """Seconds of a round's parts, as they are when a shape is chosen.

    Attributes:
        calibration: what passes cost.
        num_sessions: sessions that share a pass.
        context_len: keys that each row sees.
        draft_fixed, draft_level: of a propose, and of each level of its tree.
        known_level: of a level, by the drafter's own measurement; 0 when it is not known.
        plain_seconds: for how long a crowd's plain tokens come together.
    """

    calibration: Calibration
    num_sessions: int
    context_len: int
    draft_fixed: float
    draft_level: float
    known_level: float
    plain_seconds: float = 0.0

    @classmethod
    def of(
        cls,
        calibration: Calibration,
        record: DrafterRecord,
        num: int,
        context: int,
        plain_seconds: float = 0.0,
    ) -> Self:
        """For `num` sessions at once of `context` tokens each, drafted for together."""
        slowness = record.slowness(num)
        fixed, level = (slowness * seconds for seconds in record.cost.parts())
        known = slowness * record.cost.known_level
        return cls(calibration, num, context, fixed, level, known, plain_seconds)

    def verify(self, num_nodes: int) -> float:
        """A pass that carries `num_nodes` guesses a session, and what comes with every round."""
        known = self.calibration
        seconds = known.costs.at(self.num_sessions * (num_nodes + 1), self.context_len)
        return seconds + known.overhead_seconds.value

    def plain(self) -> float:
        """A plain token; where several come together, they share what comes with a round."""
        alone = self.verify(0)
        if self.num_sessions <= CROWD:
            return alone
        together = tokens_within(self.plain_seconds, alone)
        return alone - self.calibration.overhead_seconds.value * (1.0 - 1.0 / together)

    def draft(self, depth: int) -> float:
        """A propose of `depth` levels."""
        return self.draft_fixed + depth * self.draft_level

    def steps(self) -> tuple[int, int, int]:
        """The same for contexts and drafters that make the same choice; passes are not in it."""
        least = LEAST_SHARE * self.verify(0)
        drafts = (self.draft_fixed, MAX_LEVELS * self.draft_level)
        fixed, levels = (_step(seconds if seconds > least else 0.0) for seconds in drafts)
        return _step(self.context_len), fixed, levels


@dataclass(frozen=True)
class Choice:
    """Nodes and levels that win, whatever plain decoding does, and by how much.

    Attributes:
        num_nodes, depth: of the tree.
        gain: its tokens a second over those of plain decoding.
        least_wait, most_wait: plain rounds of all sessions that pay for one probe, if the drafter
            is as fast as it says, and if it is as slow as it seems.
        hopeless: whether no tree would pay even if every guess were right.
    """

    num_nodes: int
    depth: int
    gain: float
    least_wait: int
    most_wait: int
    hopeless: bool


class AdaptiveShape:
    """The size m and depth l that promise most tokens a second, in every round anew.

    With B sessions in a pass, measured costs T and the expected tokens F(m, l) of the best tree of
    that size and depth by the measured acceptance of its ranks and depths,

        goodput(m, l) = F(m, l) / (T(B (m + 1), context) + fixed + l * level + overhead)

    and without a tree 1 / (T(B, context) + overhead). Within (m, l) the drafter grows best-first:
    it knows how sure it is of each node, which no shape drawn beforehand does. Speculation has to
    win by START_MARGIN to begin and by STAY_MARGIN to go on. While it does not, one round is tried
    now and then all the same, for acceptance is unknown without a guess: after PROBE_ROUNDS rounds
    of all sessions together, after twice as many each time it was in vain, and as rarely in the end
    as keeps the probes' cost below PROBE_SHARE. A drafter that is slow by its own account is not
    tried more often than that from the beginning, and where rows are so dear that not even guesses
    that are all right would pay, nothing is tried.

    More than CROWD sessions are decided for as one, for their rows are each other's costs, and
    probe that rarely from the beginning.
    """

    def __init__(
        self, default: ShapeQuery, calibration: Calibration, plain_seconds: float = 0.0
    ) -> None:
        """Choose trees no larger and no deeper than `default`, where a request does not say.

        A crowd's plain tokens come together for `plain_seconds`.
        """
        self._default = default
        self._plain_seconds = plain_seconds
        self._calibration = calibration
        # Sessions at once when that was last known, those of late, and those that began since and
        # still are.
        self._num_sessions = 0
        self._recent = RecentMost()
        self._beginning: WeakSet[RoundHistory] = WeakSet()
        self._tables: OrderedDict[tuple[object, ...], TokenTable] = OrderedDict()
        self._choices: OrderedDict[tuple[object, ...], Choice] = OrderedDict()
        # Those of crowds, until about every session has planned a round.
        self._of_crowds: OrderedDict[tuple[object, ...], Choice] = OrderedDict()
        self._num_planned = 0

    @property
    def num_kept(self) -> int:
        """Choices and tables kept."""
        return len(self._choices) + len(self._of_crowds) + len(self._tables)

    def history(self, temperature: float, context_len: int) -> RoundHistory:
        """A session's history, which shares what all of them learn."""
        return RoundHistory(self._calibration, temperature=temperature, context_len=context_len)

    def plan(
        self,
        options: SpeculationOptions,
        history: RoundHistory,
        num_sessions: int,
        of_late: int = 0,
    ) -> ShapeQuery:
        """The nodes and depth of highest goodput, possibly none."""
        asked = requested(options, self._default)
        history.load = self._load(history, num_sessions, of_late)
        sharing = history.load.num_sessions
        if asked.widths or is_root_alone(asked):
            return asked
        record, crowded = history.record, sharing > CROWD
        if num_sessions:
            _notice_load(record, sharing)
        choice = self._choice(record, history, asked)
        going = history.speculating
        if going is None or crowded:
            going = record.num_idle_rounds == 0
        history.speculating = choice.gain > 1.0 + (STAY_MARGIN if going else START_MARGIN)
        if history.speculating:
            _goes_on(record, sharing)
            return _best_first(choice.num_nodes, choice.depth, asked.branch)
        if not _is_probe(record, choice, sharing):
            return _best_first(0, asked.max_depth, asked.branch)
        history.load = RoundLoad(sharing, 1, probe=True)
        return _best_first(1, 1, asked.branch)

    def never_guesses(self, options: SpeculationOptions) -> bool:
        """Whether the request and the cluster leave no room for a guess."""
        return is_root_alone(requested(options, self._default))

    def _load(self, history: RoundHistory, num_sessions: int, of_late: int) -> RoundLoad:
        """Sessions at once, this one included; a guess where it has no place yet and is told 0.

        Such a session comes on top of those that have a place, for many may begin at once, or takes
        the place of one that was there of late, at whichever worker: which will be its own nobody
        knows yet. Those of late are counted from when somebody last planned with them. It is one of
        `of_late` that are let in: of many that come at once the first would else guess as if they
        were few, and be out of step with the others from then on.
        """
        if not num_sessions:
            self._beginning.add(history)
            now = max(self._num_sessions + len(self._beginning), of_late)
            return RoundLoad(self._recent.most(now), now)
        self._num_sessions, sharing = num_sessions, max(num_sessions, of_late)
        self._recent.note(sharing)
        if self._beginning:
            self._beginning.clear()
        return RoundLoad(sharing, num_sessions)

    def _choice(self, record: DrafterRecord, history: RoundHistory, asked: ShapeQuery) -> Choice:
        """The best choice; for a crowd by what costs were at most a round of every session ago."""
        sharing = history.load.num_sessions
        if sharing <= CROWD:
            return self._look(record, history, asked, round(history.shift / SHIFT_STEP))
        self._num_planned += 1
        if self._num_planned >= sharing:
            self._num_planned = 0
            self._of_crowds.clear()
        size = history.context_len.bit_length()
        # Exactly, where a step would do: its logarithm costs more than the few choices too many.
        key = (record.snapshot, asked.max_nodes, asked.max_depth, sharing, size)
        found = self._of_crowds.get(key)
        if found is None:
            found = self._of_crowds[key] = self._look(record, history, asked, shift=0)
            _bound(self._of_crowds, MAX_CHOICES)
        return found

    def _look(
        self, record: DrafterRecord, history: RoundHistory, asked: ShapeQuery, shift: int
    ) -> Choice:
        """The best choice by what everything costs now, remembered while that hardly changes."""
        sharing = history.load.num_sessions
        if sharing > CROWD:
            # What tells them apart, and what wanders from answer to answer, is looked at coarsely:
            # else each of the many would make a choice of its own.
            steps = self._costs(record, history).steps()
            near = (_step(sharing), *(step // STEPS_OF_A_CROWD for step in steps))
        else:
            near = (sharing, *self._costs(record, history).steps())
        passes = int(self._calibration.num_passes) // PASSES_A_CHOICE
        key = (record.snapshot, shift, asked.max_nodes, asked.max_depth, passes, *near)
        found = self._choices.get(key)
        if found is None:
            costs = self._costs(record, history)
            found = best_choice(self._table(record.snapshot.acceptance, shift, asked), costs)
            if found.gain <= 1.0 + START_MARGIN:
                best = self._table(ALWAYS_RIGHT, 0, asked)
                fastest = replace(costs, draft_fixed=0.0, draft_level=costs.known_level)
                hopeless = best_choice(best, fastest).gain <= 1.0 + STAY_MARGIN
                found = replace(found, hopeless=hopeless)
            self._choices[key] = found
            _bound(self._choices, MAX_CHOICES)
        return found

    def _costs(self, record: DrafterRecord, history: RoundHistory) -> RoundCosts:
        load, context_len = history.load, history.context_len
        return RoundCosts.of(
            self._calibration, record, load.num_sessions, context_len, self._plain_seconds
        )

    def _table(self, acceptance: Acceptance, shift: int, asked: ShapeQuery) -> TokenTable:
        max_nodes, max_depth = min(asked.max_nodes, MAX_NODES), min(asked.max_depth, MAX_DEPTH)
        key = (acceptance, shift, max_nodes, max_depth)
        table = self._tables.get(key)
        if table is None:
            shifted = shift_acceptance(acceptance, shift * SHIFT_STEP)
            table = expected_tokens(shifted, max_nodes, min(max_depth, max_nodes))
            self._tables[key] = table
            _bound(self._tables, MAX_TABLES)
        return table


@lru_cache(maxsize=MAX_CHOICES)
def _best_first(max_nodes: int, max_depth: int, branch: int) -> ShapeQuery:
    """The same object for the same numbers, of which there are few."""
    return ShapeQuery(max_nodes, max_depth, branch=branch)


def _notice_load(record: DrafterRecord, num_sessions: int) -> None:
    """With fewer than half as many sessions, what was in vain before says little."""
    if num_sessions > record.crowd:
        record.crowd = num_sessions
    elif 2 * num_sessions < record.crowd:
        record.crowd = num_sessions
        record.num_vain_probes = record.num_vain_starts = 0


def _goes_on(record: DrafterRecord, num_sessions: int) -> None:
    """A round with guesses that are expected to pay."""
    record.num_idle_rounds = 0
    record.num_busy_rounds += 1
    if record.num_busy_rounds > LASTING_ROUNDS * num_sessions:
        record.num_vain_probes = record.num_vain_starts = 0


def _is_probe(record: DrafterRecord, choice: Choice, num_sessions: int) -> bool:
    """Whether a round in which guesses are not expected to pay tries one all the same."""
    if 0 < record.num_busy_rounds <= LASTING_ROUNDS * num_sessions:
        record.num_vain_starts = min(MOST_VAIN_STARTS, record.num_vain_starts + 1)
    record.num_busy_rounds = 0
    record.num_idle_rounds += 1
    wait = choice.most_wait
    if num_sessions <= CROWD:
        wait = min(PROBE_ROUNDS << min(record.num_vain_probes, 16), wait)
    wait = max(wait, choice.least_wait) << record.num_vain_starts
    if choice.hopeless or record.num_idle_rounds <= wait:
        return False
    record.num_idle_rounds = 1
    record.num_vain_probes += 1
    return True


def best_choice(tokens: TokenTable, costs: RoundCosts) -> Choice:
    """The tree of highest goodput among the table's depths and some sizes, the root's excluded."""
    plain = costs.plain()
    best_goodput, best_nodes, best_depth = 0.0, 1, 1
    for num_nodes in sizes(len(tokens[0]) - 1):
        verify = costs.verify(num_nodes)
        for depth in range(1, min(num_nodes, len(tokens) - 1) + 1):
            goodput = tokens[depth][num_nodes] / (verify + costs.draft(depth))
            if goodput > best_goodput:
                best_goodput, best_nodes, best_depth = goodput, num_nodes, depth
    return Choice(
        best_nodes,
        best_depth,
        best_goodput * plain,
        least_wait=_rounds_for_a_probe(costs, costs.known_level),
        most_wait=_rounds_for_a_probe(costs, max(costs.known_level, costs.draft(1))),
        hopeless=False,
    )


def _rounds_for_a_probe(costs: RoundCosts, draft_seconds: float) -> int:
    """Plain rounds that pay for a probe: one more row in the pass, and the wait for the guess.

    All sessions bear it, for a pass waits for one that is due, though no longer than a pass takes.
    """
    batch, known = costs.num_sessions, costs.calibration.costs
    # Both by the same factor, for the two counts may be of different classes.
    fewer, more = (known.at(count, costs.context_len) for count in (batch, batch + 1))
    more *= known.factor(batch) / known.factor(batch + 1)
    probe = draft_seconds + (batch - 1) * min(draft_seconds, fewer) + batch * (more - fewer)
    return max(PROBE_ROUNDS, math.ceil(probe / (PROBE_SHARE * costs.verify(0))))


def sizes(max_nodes: int) -> Iterator[int]:
    """Sizes worth looking at: every small one, then steps of an eighth, and the largest."""
    size = 1
    while size < max_nodes:
        yield size
        size += max(1, size // 8)
    if max_nodes:
        yield max_nodes


def _step(value: float) -> int:
    """The same number for values that differ little."""
    return round(STEPS_AN_OCTAVE * math.log2(value)) if value > 0 else -(10**6)


def _bound(kept: OrderedDict[tuple[object, ...], Any], most: int) -> None:
    while len(kept) > most:
        kept.popitem(last=False)
