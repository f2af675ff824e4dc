"""From answers to ratios and agreement. Pure arithmetic: it runs nothing and prints nothing.

A ratio is taken for each task of each repeat, of runs that were made within seconds of each other;
what is reported is their median and its bootstrap interval. Rates are tokens over all the time of a
run, its prompt included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from specinfer_bench.peers.interleave import Answers, Outcome
from specinfer_bench.peers.peer import Answer, Arm
from specinfer_bench.spread import Spread, spread


@dataclass(frozen=True)
class ArmReport:
    """One arm beside ours.

    Attributes:
        plain: whether it decodes without guesses.
        tokens_per_second: tokens over time, over all tasks and repeats.
        first_token_ms: median time to the first token in milliseconds; None where it is not told.
        over_plain: its rate over that of our plain decoding.
        ours_over_it: the rate of our speculative decoding over its.
        num_same: tasks whose tokens were those of our plain decoding in every repeat; None where
            tokens are not told or drawn in another way.
        first_differences: by number of the task, the place of the first other token.
    """

    plain: bool
    tokens_per_second: float
    first_token_ms: float | None
    over_plain: Spread
    ours_over_it: Spread
    num_same: int | None
    first_differences: Mapping[int, int]


@dataclass(frozen=True)
class PeerReport:
    """All arms at one temperature.

    Attributes:
        temperature: 0 is greedy.
        num_tasks, num_repeats: what was run; a load's last repeat may lack its last tasks.
        baseline: our plain arm, which outputs are compared with.
        ours: our speculative arm.
        arms: by name.
        failed: by name, why an arm gave no numbers.
    """

    temperature: float
    num_tasks: int
    num_repeats: int
    baseline: str
    ours: str
    arms: Mapping[str, ArmReport]
    failed: Mapping[str, str]

    def as_dict(self) -> dict[str, object]:
        """The report as plain data for JSON."""
        return asdict(self)


def build_report(
    outcome: Outcome,
    arms: Mapping[str, Arm],
    *,
    temperature: float,
    eos_token_ids: frozenset[int],
    baseline: str,
    ours: str,
) -> PeerReport:
    """Compare all arms with `baseline` and `ours`.

    Args:
        outcome: what they gave.
        arms: all of them, by name.
        temperature: at which they ran.
        eos_token_ids: an end token counts as no difference: some engines tell it, others do not.
        baseline: name of our plain arm.
        ours: name of our speculative arm.

    Raises:
        ValueError: when one of ours has failed; there is nothing to compare with then.
    """
    for name in (baseline, ours):
        if name not in outcome.answers:
            raise ValueError(f"{name} failed: {outcome.failed.get(name, 'it did not run')}")
    plain, speculative = outcome.answers[baseline], outcome.answers[ours]
    num_tasks = max(len(repeat) for repeat in plain)

    def report(name: str, answers: Answers) -> ArmReport:
        comparable = temperature == 0 or arms[name].seeded
        differences = first_differences(plain, answers, eos_token_ids) if comparable else None
        return ArmReport(
            plain=arms[name].plain,
            tokens_per_second=_tokens_per_second(answers),
            first_token_ms=_first_token_ms(answers),
            over_plain=_ratio(answers, plain),
            ours_over_it=_ratio(speculative, answers),
            num_same=None if differences is None else num_tasks - len(differences),
            first_differences=differences or {},
        )

    return PeerReport(
        temperature=temperature,
        num_tasks=num_tasks,
        num_repeats=len(plain),
        baseline=baseline,
        ours=ours,
        arms={name: report(name, answers) for name, answers in outcome.answers.items()},
        failed=outcome.failed,
    )


def first_differences(
    reference: Answers, answers: Answers, eos_token_ids: frozenset[int]
) -> dict[int, int] | None:
    """By number of the task, where the tokens first differ; None where they are not told.

    Past the shorter output's end is a difference too, unless an end token is all that is left.
    """
    found: dict[int, int] = {}
    for expected, given in zip(reference, answers, strict=True):
        for index, (one, other) in enumerate(zip(expected, given, strict=True)):
            if one.token_ids is None or other.token_ids is None:
                return None
            place = _first_difference(
                _without_end(one.token_ids, eos_token_ids),
                _without_end(other.token_ids, eos_token_ids),
            )
            if place is not None:
                found[index] = min(place, found.get(index, place))
    return found


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


def _without_end(token_ids: Sequence[int], eos_token_ids: frozenset[int]) -> Sequence[int]:
    return token_ids[:-1] if token_ids and token_ids[-1] in eos_token_ids else token_ids


def _rate(answer: Answer) -> float:
    return answer.num_tokens / answer.seconds


def _ratio(above: Answers, below: Answers) -> Spread:
    pairs = zip(_flat(above), _flat(below), strict=True)
    return spread([_rate(one) / _rate(other) for one, other in pairs])


def _flat(answers: Answers) -> list[Answer]:
    return [answer for repeat in answers for answer in repeat]


def _tokens_per_second(answers: Answers) -> float:
    flat = _flat(answers)
    return sum(answer.num_tokens for answer in flat) / sum(answer.seconds for answer in flat)


def _first_token_ms(answers: Answers) -> float | None:
    told = [answer.first_token_seconds for answer in _flat(answers)]
    known = [seconds for seconds in told if seconds is not None]
    return 1000 * median(known) if known else None
