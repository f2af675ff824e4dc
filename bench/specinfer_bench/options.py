"""What a benchmark is asked to do, and what is valid. Knows nothing of clusters or models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specinfer.errors import InvalidRequest

GROWN_PRESETS = ("200m", "1b", "7b")


@dataclass(frozen=True)
class BenchOptions:
    """One benchmark.

    Attributes:
        router: address of a running router; None starts a local cluster for the run.
        grow: grow the local cluster's target to this preset first; its outputs stay the same.
        dtype: number format of the local cluster's target.
        model: target folder of the local cluster; None takes the demo pair's.
        draft: drafter folder of the local cluster; None takes the demo pair's.
        prompts: JSON lines file with a "prompt" in each line; None takes the demo questions.
        num_prompts: how many prompts to run.
        max_tokens: most tokens for each prompt.
        temperature: 0 is greedy.
        repeats: how often every prompt runs in every arm; the spread is over these.
        seed: seed of the first prompt; each prompt has its own.
        in_process: also run the same loop in one process, to see what the cluster costs.

    Raises:
        InvalidRequest: naming the option that is out of its range.
    """

    router: str | None = None
    grow: str | None = None
    dtype: str = "bfloat16"
    model: Path | None = None
    draft: Path | None = None
    prompts: Path | None = None
    num_prompts: int = 8
    max_tokens: int = 64
    temperature: float = 0.0
    repeats: int = 3
    seed: int = 1
    in_process: bool = False

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is at least 1", field=name)
        if self.grow is not None and self.grow not in GROWN_PRESETS:
            raise InvalidRequest(f"grow is one of {', '.join(GROWN_PRESETS)}", field="grow")
        if self.router is not None and (self.grow or self.in_process):
            raise InvalidRequest(
                "a given router has its own model: leave --grow and --in-process out",
                field="router",
            )
