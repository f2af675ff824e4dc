"""Runs cases with speculation off and on against a cluster and compares their tokens.

It uses the SDK alone, as any user would, so it can judge a cluster that is not ours to look into.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from specinfer import AsyncClient, Completion, TokenLogprob
from specinfer.errors import SpecinferError
from specinfer.messages import SpeculationOptions
from specinfer.options import GenerateOptions
from specinfer.sampling import MAX_LOGPROBS
from specinfer_bench.shapes import SHAPES
from specinfer_cli.lossless_cases import Case

MAX_REPORTED = 100


@dataclass(frozen=True)
class Divergence:
    """Two runs of a case that should be equal and are not.

    Attributes:
        case: the case.
        shape: name of the tree shape of the run that differs from plain decoding.
        position: index of the first different token in the completion.
        plain_token: token without speculation there, or None where that run had ended.
        speculated_token: token with speculation there, or None where that run had ended.
        reproduced: whether asking again with logprobs differed at the same position.
        plain_logprobs: logprobs of the two tokens in the plain run, where told, plain one first.
        speculated_logprobs: the same from the speculated run.
    """

    case: Case
    shape: str
    position: int
    plain_token: int | None
    speculated_token: int | None
    reproduced: bool = False
    plain_logprobs: tuple[float | None, float | None] = (None, None)
    speculated_logprobs: tuple[float | None, float | None] = (None, None)


@dataclass
class Tally:
    """What a check has seen so far.

    Attributes:
        num_cases: cases done.
        num_comparisons: speculated runs compared with their plain run.
        num_tokens: tokens that the speculated runs should have, those of the plain runs.
        num_rounds: rounds of the speculated runs.
        num_draft_tokens: guesses in them.
        num_accepted_tokens: guesses confirmed.
        num_divergences: comparisons that failed.
        divergences: the first MAX_REPORTED of them.
        errors: calls that failed, as text; the first MAX_REPORTED.
        num_errors: how many failed in all.
        digest: of the tokens of all plain runs, the same in whatever order they ended.
    """

    num_cases: int = 0
    num_comparisons: int = 0
    num_tokens: int = 0
    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_divergences: int = 0
    divergences: list[Divergence] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_errors: int = 0
    digest: int = 0

    @property
    def lossless(self) -> bool:
        """Whether something was compared, every guess path was used, and all was equal."""
        clean = not self.num_divergences and not self.num_errors
        return clean and self.num_comparisons > 0 and self.num_accepted_tokens > 0


class Checker:
    """Compares cases, `concurrency` of them at a time, so that their rows share passes."""

    def __init__(self, client: AsyncClient, *, chat: bool, concurrency: int) -> None:
        self.tally = Tally()
        self._client = client
        self._chat = chat
        self._concurrency = concurrency

    async def run(self, cases: Iterator[Case], done: Callable[[Tally], None]) -> Tally:
        """Check all cases and call `done` after each; failed calls are counted, not raised."""

        async def work() -> None:
            # One iterator feeds all workers: a case is made when somebody has time for it.
            for case in cases:
                await self._check(case)
                done(self.tally)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(work())
        return self.tally

    async def _check(self, case: Case) -> None:
        try:
            plain = await self._generate(case, SpeculationOptions(enabled=False))
            self.tally.digest ^= _digest(case, plain.token_ids)
            for name, shape in SHAPES.items():
                speculated = await self._generate(case, shape)
                await self._compare(case, name, plain, speculated)
        except SpecinferError as error:
            self.tally.num_errors += 1
            if len(self.tally.errors) < MAX_REPORTED:
                where = f"prompt {case.index}, {case.setting}"
                self.tally.errors.append(f"{where}: {error.reason}: {error.message}")
        self.tally.num_cases += 1

    async def _compare(
        self, case: Case, shape: str, plain: Completion, speculated: Completion
    ) -> None:
        tally = self.tally
        tally.num_comparisons += 1
        tally.num_tokens += len(plain.token_ids)
        tally.num_rounds += speculated.speculation.num_rounds
        tally.num_draft_tokens += speculated.speculation.num_draft_tokens
        tally.num_accepted_tokens += speculated.speculation.num_accepted_tokens
        position = first_difference(plain.token_ids, speculated.token_ids)
        if position is None and plain.text == speculated.text:
            return
        tally.num_divergences += 1
        if len(tally.divergences) < MAX_REPORTED:
            where = len(plain.token_ids) if position is None else position
            tally.divergences.append(await self._explain(case, shape, where, plain, speculated))

    async def _explain(
        self, case: Case, shape: str, position: int, plain: Completion, speculated: Completion
    ) -> Divergence:
        """Run both again with logprobs and take those of the two tokens at `position`."""
        tokens = (_at(plain.token_ids, position), _at(speculated.token_ids, position))
        try:
            again = [
                await self._generate(case, options, logprobs=MAX_LOGPROBS)
                for options in (SpeculationOptions(enabled=False), SHAPES[shape])
            ]
        except SpecinferError:
            return Divergence(case, shape, position, *tokens)
        found = first_difference(again[0].token_ids, again[1].token_ids)
        first, second = (_logprobs_at(run.logprobs, position, tokens) for run in again)
        return Divergence(case, shape, position, *tokens, found == position, first, second)

    async def _generate(
        self, case: Case, speculation: SpeculationOptions, logprobs: int | None = None
    ) -> Completion:
        options: GenerateOptions = {
            **case.options(),
            "speculation": speculation,
            "logprobs": logprobs,
        }
        if not self._chat:
            return await self._client.generate(case.prompt, **options)
        options["messages"] = [{"role": "user", "content": case.prompt}]
        return await self._client.generate(**options)


def _digest(case: Case, token_ids: Sequence[int]) -> int:
    text = repr((case.index, case.setting, case.seed, tuple(token_ids)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest())


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two runs differ, or None when they are equal."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))


def _at(token_ids: Sequence[int], position: int) -> int | None:
    return token_ids[position] if position < len(token_ids) else None


def _logprobs_at(
    logprobs: Sequence[TokenLogprob], position: int, tokens: tuple[int | None, int | None]
) -> tuple[float | None, float | None]:
    if position >= len(logprobs):
        return (None, None)
    entry = logprobs[position]
    known = {**dict(entry.top), entry.token_id: entry.logprob}
    first, second = (None if token is None else known.get(token) for token in tokens)
    return (first, second)
