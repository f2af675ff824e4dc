"""Usage in OpenAI's shape, and speculation's metrics in vLLM's, over the choices of one call.

A guess counts as accepted when the target confirmed it, whoever guessed: a drafter or the caller's
own prediction. This module knows nothing of texts or streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from specinfer.messages import Finished, RoundFacts


@dataclass
class RoundCounts:
    """Guessed and confirmed tokens of each round that had a guess.

    Attributes:
        drafted: guessed tokens, round by round.
        accepted: of these, the confirmed ones.
        deepest: depth of the deepest tree.
    """

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    deepest: int = 0

    def add(self, facts: RoundFacts) -> None:
        """Count one round; one without a guess is no step of speculation."""
        if facts.num_draft_tokens:
            self.drafted.append(facts.num_draft_tokens)
            self.accepted.append(facts.num_accepted_tokens)
            self.deepest = max(self.deepest, facts.draft_depth, facts.num_accepted_tokens)


def usage_so_far(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, Any]:
    """Usage while tokens still come."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


def usage_of(finished: Sequence[Finished], choices_per_prompt: int) -> dict[str, Any]:
    """Usage of a whole call; a prompt counts once, however many choices it has."""
    prompts = finished[::choices_per_prompt]
    drafted = sum(end.speculation.num_draft_tokens for end in finished)
    accepted = sum(end.speculation.num_accepted_tokens for end in finished)
    totals = usage_so_far(
        sum(end.usage.num_prompt_tokens for end in prompts),
        sum(end.usage.num_completion_tokens for end in finished),
    )
    return totals | {
        "prompt_tokens_details": {
            "cached_tokens": sum(end.usage.num_cached_tokens for end in prompts),
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
            "reasoning_tokens": 0,
            "audio_tokens": 0,
        },
    }


def metrics_of(
    finished: Sequence[Finished], counts: Sequence[RoundCounts], *, detail: bool
) -> dict[str, Any]:
    """vLLM's `metrics`, and where the time of the slowest choice went."""
    slowest = max(finished, key=lambda end: end.timings.total_seconds)
    return {"speculative_decoding": speculation_of_rounds(counts, detail=detail)} | asdict(
        slowest.timings
    )


def speculation_of_rounds(counts: Sequence[RoundCounts], *, detail: bool) -> dict[str, Any]:
    """vLLM's `speculative_decoding`: steps are rounds with a guess, the histogram is dense."""
    drafted = [number for count in counts for number in count.drafted]
    accepted = [number for count in counts for number in count.accepted]
    num_steps, num_drafted, num_accepted = len(drafted), sum(drafted), sum(accepted)
    deepest = max(count.deepest for count in counts)
    histogram = Counter(accepted)
    summary: dict[str, Any] = {
        "mean_acceptance_length": 1 + num_accepted / num_steps if num_steps else 1.0,
        "draft_acceptance_rate": num_accepted / num_drafted if num_drafted else 0.0,
        "acceptance_histogram": [histogram[number] for number in range(deepest + 1)],
        "num_spec_steps": num_steps,
        "num_accepted_draft_tokens": num_accepted,
        "num_draft_tokens": num_drafted,
        "num_spec_tokens": deepest,
    }
    if detail:
        summary |= {"per_step_accepted": accepted, "per_step_drafted": drafted}
    return summary
