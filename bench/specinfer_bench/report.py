"""From samples to the numbers of a report. Pure arithmetic: it runs nothing and prints nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from specinfer_bench.measure import Sample

Arm = str
OFF, ON, IN_PROCESS = "off", "on", "in_process"


@dataclass(frozen=True)
class ArmReport:
    """One way of running the prompts.

    Attributes:
        tokens_per_second: generated tokens over wall time, over all prompts and repeats.
        first_token_ms: median time to the first token, in milliseconds.
        tokens_per_round: generated tokens over rounds.
        round_ms: mean time of one round by place, in milliseconds.
    """

    tokens_per_second: float
    first_token_ms: float
    tokens_per_round: float
    round_ms: Mapping[str, float]


@dataclass(frozen=True)
class BenchReport:
    """What a benchmark found.

    Attributes:
        speedup: median over the repeats of time without over time with speculation.
        speedup_min: smallest of them.
        speedup_max: largest of them.
        identical: whether every prompt gave the same tokens in every run.
        accepted_by_depth: share of drafted rounds whose guess at depth 1, 2, ... was confirmed.
        mean_accepted_tokens: confirmed guesses for each round with a guess.
        cluster_overhead: median over the repeats of the cluster's time over the same loop's time
            in one process, less 1; None when it was not measured.
        arms: each way of running the prompts.
        num_prompts: prompts run.
        num_tokens: tokens of one pass over the prompts.
        setup: what was run on what: `command`, `options` and `machine`, and what the router said
            of itself, `model`, `model_hash` and `dtype`.
    """

    speedup: float
    speedup_min: float
    speedup_max: float
    identical: bool
    accepted_by_depth: tuple[float, ...]
    mean_accepted_tokens: float
    cluster_overhead: float | None
    arms: Mapping[Arm, ArmReport]
    num_prompts: int
    num_tokens: int
    setup: Mapping[str, object]

    def as_dict(self) -> dict[str, object]:
        """The report as plain data for JSON."""
        return asdict(self)


Passes = Sequence[Mapping[Arm, Sequence[Sample]]]


def build_report(passes: Passes, setup: Mapping[str, object]) -> BenchReport:
    """Report over repeats; `passes[repeat][arm]` has one sample for each prompt, in order."""
    speedups = [_seconds(one[OFF]) / _seconds(one[ON]) for one in passes]
    reference = [sample.token_ids for sample in passes[0][OFF]]
    by_depth = _accepted_by_depth([sample for one in passes for sample in one[ON]])
    return BenchReport(
        speedup=median(speedups),
        speedup_min=min(speedups),
        speedup_max=max(speedups),
        identical=all(
            [sample.token_ids for sample in samples] == reference
            for one in passes
            for samples in one.values()
        ),
        accepted_by_depth=by_depth,
        mean_accepted_tokens=sum(by_depth),
        cluster_overhead=_cluster_overhead(passes),
        arms={arm: _arm_report([s for one in passes for s in one[arm]]) for arm in passes[0]},
        num_prompts=len(reference),
        num_tokens=sum(len(tokens) for tokens in reference),
        setup=setup,
    )


def _seconds(samples: Sequence[Sample]) -> float:
    return sum(sample.seconds for sample in samples)


def _cluster_overhead(passes: Passes) -> float | None:
    if IN_PROCESS not in passes[0]:
        return None
    return median(_seconds(one[ON]) / _seconds(one[IN_PROCESS]) for one in passes) - 1.0


def _accepted_by_depth(samples: Sequence[Sample]) -> tuple[float, ...]:
    drafted = [facts for sample in samples for facts in sample.rounds if facts.num_draft_tokens]
    deepest = max((facts.num_accepted_tokens for facts in drafted), default=0)
    return tuple(
        sum(facts.num_accepted_tokens >= depth for facts in drafted) / len(drafted)
        for depth in range(1, deepest + 1)
    )


def _arm_report(samples: Sequence[Sample]) -> ArmReport:
    rounds = [facts for sample in samples for facts in sample.rounds]
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    places = ("draft", "verify", "queue", "network", "router")
    return ArmReport(
        tokens_per_second=num_tokens / _seconds(samples),
        first_token_ms=1000 * median(sample.first_token_seconds for sample in samples),
        tokens_per_round=num_tokens / max(1, len(rounds)),
        round_ms={
            place: 1000 * sum(getattr(facts, f"{place}_seconds") for facts in rounds) / len(rounds)
            for place in places
        }
        if rounds
        else {},
    )
