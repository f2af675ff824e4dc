"""Which runs `specinfer lossless` compares: sampling settings, and what a case is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from specinfer.options import GenerateOptions

# Greedy output does not depend on the seed, so those settings run once a prompt.
GREEDY_SETTINGS: dict[str, GenerateOptions] = {
    "greedy": {"temperature": 0.0},
    "greedy, penalties": {
        "temperature": 0.0,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.3,
    },
}
SAMPLED_SETTINGS: dict[str, GenerateOptions] = {
    "temperature 0.6": {"temperature": 0.6},
    "temperature 1": {"temperature": 1.0},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top-k 20": {"temperature": 1.3, "top_k": 20},
    "min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "penalties, top-p 0.95": {
        "temperature": 0.8,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
    },
}


@dataclass(frozen=True)
class Case:
    """One prompt under one setting and seed.

    Attributes:
        index: which prompt, from 0.
        prompt: its text.
        setting: name of the sampling setting.
        seed: decides the noise; greedy settings have none.
        max_tokens: most tokens to generate.
    """

    index: int
    prompt: str
    setting: str
    seed: int
    max_tokens: int

    def options(self) -> GenerateOptions:
        """What every run of the case asks for."""
        settings = {**GREEDY_SETTINGS, **SAMPLED_SETTINGS}
        return {**settings[self.setting], "seed": self.seed, "max_tokens": self.max_tokens}


def all_cases(prompts: Sequence[str], num_samples: int, max_tokens: int) -> Iterator[Case]:
    """Every prompt under every setting; sampled settings once for each of `num_samples` seeds.

    Seeds are spread over the prompts so that no two cases of a setting share their noise.
    """
    for index, prompt in enumerate(prompts):
        for setting in GREEDY_SETTINGS:
            yield Case(index, prompt, setting, 0, max_tokens)
        for sample in range(num_samples):
            seed = 1 + index * num_samples + sample
            for setting in SAMPLED_SETTINGS:
                yield Case(index, prompt, setting, seed, max_tokens)


def num_cases(num_prompts: int, num_samples: int) -> int:
    """How many cases `all_cases` yields."""
    return num_prompts * (len(GREEDY_SETTINGS) + num_samples * len(SAMPLED_SETTINGS))
