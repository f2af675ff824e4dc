"""Sums over completions: rates by depth, tokens a round, where the time went."""

from specinfer import Completion, RoundFacts, SpeculationSummary, Usage
from specinfer_cli.statistics import Statistics


def completion(num_tokens: int, summary: SpeculationSummary, *rounds: RoundFacts) -> Completion:
    token_ids = tuple(range(num_tokens))
    return Completion(
        "", token_ids, (), "length", "", Usage(), summary, 0, "m", "r", "s", tuple(rounds)
    )


def test_sums_and_rates() -> None:
    first = completion(
        10,
        SpeculationSummary(5, 4, 16, 5, (4, 1), (("late", 1),)),
        RoundFacts(1, draft_seconds=0.1, verify_seconds=0.2),
        RoundFacts(2, draft_seconds=0.1, queue_seconds=0.5, network_seconds=0.25),
    )
    second = completion(
        6,
        SpeculationSummary(5, 4, 8, 1, (1,), (("budget", 1), ("late", 2))),
        RoundFacts(1, router_seconds=0.125),
    )
    sums = Statistics().add(first, 1.5).add(second, 0.5)
    assert (sums.num_requests, sums.num_tokens, sums.num_rounds, sums.num_drafts) == (2, 16, 10, 8)
    assert sums.tokens_per_second == 8.0
    assert sums.tokens_per_round == 1.6
    assert sums.accepted_by_depth == (5, 1)
    assert sums.acceptance_by_depth == (0.625, 0.125)
    assert sums.root_only_reasons == (("budget", 1), ("late", 3))
    assert (sums.draft_seconds, sums.verify_seconds) == (0.2, 0.2)
    assert (sums.queue_seconds, sums.network_seconds, sums.router_seconds) == (0.5, 0.25, 0.125)
    assert sums.lines() == [
        "16 tokens in 2.00 s: 8.0 tokens/s",
        "10 rounds, 1.60 tokens a round, 6 of 24 guesses confirmed",
        "confirmed by depth: 62%  12%",
        "rounds without a guess: budget 1, late 3",
        "seconds: draft 0.200  verify 0.200  queue 0.500  network 0.250  router 0.125",
    ]
    assert sums.as_dict()["root_only_reasons"] == {"budget": 1, "late": 3}


def test_nothing_yet() -> None:
    assert Statistics().lines() == [
        "0 tokens in 0.00 s: 0.0 tokens/s",
        "0 rounds, 0.00 tokens a round, 0 of 0 guesses confirmed",
        "confirmed by depth: no guesses",
        "seconds: draft 0.000  verify 0.000  queue 0.000  network 0.000  router 0.000",
    ]
