"""What every engine in the comparison looks like: it may be missing, it loads, it runs prompts.

This module knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Pair:
    """The models that every engine runs.

    Attributes:
        target: folder of the target's checkpoint.
        draft: folder of the drafter's.
        dtype: number format of the weights of both.
        threads: compute threads that an engine may use.
        eos_token_ids: tokens that end a text.
        cache: folder for what an engine makes of the checkpoints.
        device: where engines that can choose run, such as cpu or cuda:0.
    """

    target: Path
    draft: Path
    dtype: str
    threads: int
    eos_token_ids: frozenset[int]
    cache: Path
    device: str = "cpu"


@dataclass(frozen=True)
class Task:
    """One prompt to run.

    Attributes:
        text: the prompt, chat template included.
        token_ids: the same as tokens, begin token included.
        max_tokens: most tokens to generate.
        temperature: 0 is greedy; otherwise the whole distribution is drawn from.
        seed: for engines that take one; two engines do not draw alike.
    """

    text: str
    token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Answer:
    """What one run gave.

    Attributes:
        num_tokens: tokens generated, an end token included.
        seconds: from the prompt to the last token.
        token_ids: the tokens, or None where the engine tells only their text.
        first_token_seconds: to the first token, or None where the engine does not tell.
    """

    num_tokens: int
    seconds: float
    token_ids: tuple[int, ...] | None = None
    first_token_seconds: float | None = None


@dataclass(frozen=True)
class Arm:
    """One way of running prompts on a loaded engine.

    Attributes:
        run: runs a prompt to its end; raises what the engine raises.
        plain: whether it decodes one token a step, without guesses.
        greedy_only: whether it runs at temperature 0 alone.
        seeded: whether a seed gives it the tokens that our plain decoding draws; only then are its
            outputs compared above temperature 0.
    """

    run: Callable[[Task], Answer]
    plain: bool = False
    greedy_only: bool = False
    seeded: bool = False


class Peer(Protocol):
    """An engine."""

    name: str

    def missing(self) -> str | None:
        """Why it cannot run here, or None when it can; cheap."""
        ...

    def load(self, pair: Pair) -> AbstractContextManager[Mapping[str, Arm]]:
        """Its arms by name, loaded and kept until the block ends.

        Raises:
            SpecinferError: when the models cannot be loaded, with the reason.
        """
        ...
