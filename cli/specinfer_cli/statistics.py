"""Counts what speculation did over one or many completions and puts it into words.

This module knows nothing of terminals.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from specinfer.completion import Completion


@dataclass(frozen=True)
class Statistics:
    """Sums over completions.

    Attributes:
        num_requests: completions counted.
        num_tokens: tokens generated.
        num_rounds: rounds run.
        num_drafts: rounds with a guess.
        num_draft_tokens: guessed tokens.
        num_accepted_tokens: guessed tokens confirmed.
        accepted_by_depth: confirmed tokens, depth 1 first.
        root_only_reasons: rounds without a guess, by reason.
        seconds: time from call to last event.
        draft_seconds, verify_seconds, queue_seconds, network_seconds, router_seconds: where the
            rounds' time went.
    """

    num_requests: int = 0
    num_tokens: int = 0
    num_rounds: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_by_depth: tuple[int, ...] = ()
    root_only_reasons: tuple[tuple[str, int], ...] = ()
    seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    queue_seconds: float = 0.0
    network_seconds: float = 0.0
    router_seconds: float = 0.0

    def add(self, completion: Completion, seconds: float) -> Statistics:
        """The sums with one more completion, which took `seconds`."""
        summary, rounds = completion.speculation, completion.rounds
        return Statistics(
            num_requests=self.num_requests + 1,
            num_tokens=self.num_tokens + len(completion.token_ids),
            num_rounds=self.num_rounds + summary.num_rounds,
            num_drafts=self.num_drafts + summary.num_drafts,
            num_draft_tokens=self.num_draft_tokens + summary.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens + summary.num_accepted_tokens,
            accepted_by_depth=_sum(self.accepted_by_depth, summary.num_accepted_tokens_per_pos),
            root_only_reasons=_count(self.root_only_reasons, summary.root_only_reasons),
            seconds=self.seconds + seconds,
            draft_seconds=self.draft_seconds + sum(r.draft_seconds for r in rounds),
            verify_seconds=self.verify_seconds + sum(r.verify_seconds for r in rounds),
            queue_seconds=self.queue_seconds + sum(r.queue_seconds for r in rounds),
            network_seconds=self.network_seconds + sum(r.network_seconds for r in rounds),
            router_seconds=self.router_seconds + sum(r.router_seconds for r in rounds),
        )

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens by wall time."""
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a round committed, on average; plain decoding has 1, or some at a time."""
        return self.num_tokens / self.num_rounds if self.num_rounds else 0.0

    @property
    def acceptance_by_depth(self) -> tuple[float, ...]:
        """Share of the rounds with a guess whose guess was confirmed at each depth."""
        return tuple(count / self.num_drafts for count in self.accepted_by_depth)

    def lines(self) -> list[str]:
        """A few short lines for people."""
        depths = "  ".join(f"{share:.0%}" for share in self.acceptance_by_depth)
        parts = (
            ("draft", self.draft_seconds),
            ("verify", self.verify_seconds),
            ("queue", self.queue_seconds),
            ("network", self.network_seconds),
            ("router", self.router_seconds),
        )
        times = "  ".join(f"{name} {seconds:.3f}" for name, seconds in parts)
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.root_only_reasons)
        without = [f"rounds without a guess: {reasons}"] if reasons else []
        return [
            f"{self.num_tokens} tokens in {self.seconds:.2f} s: "
            f"{self.tokens_per_second:.1f} tokens/s",
            f"{self.num_rounds} rounds, {self.tokens_per_round:.2f} tokens a round, "
            f"{self.num_accepted_tokens} of {self.num_draft_tokens} guesses confirmed",
            f"confirmed by depth: {depths or 'no guesses'}",
            *without,
            f"seconds: {times}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """The same numbers for programs."""
        return {
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_round": self.tokens_per_round,
            "num_rounds": self.num_rounds,
            "num_drafts": self.num_drafts,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "num_accepted_tokens_per_pos": list(self.accepted_by_depth),
            "root_only_reasons": dict(self.root_only_reasons),
            "draft_seconds": self.draft_seconds,
            "verify_seconds": self.verify_seconds,
            "queue_seconds": self.queue_seconds,
            "network_seconds": self.network_seconds,
            "router_seconds": self.router_seconds,
        }


def _count(
    left: tuple[tuple[str, int], ...], right: tuple[tuple[str, int], ...]
) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((Counter(dict(left)) + Counter(dict(right))).items()))


def _sum(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    length = max(len(left), len(right))
    padded = [values + (0,) * (length - len(values)) for values in (left, right)]
    return tuple(one + other for one, other in zip(*padded, strict=True))
