"""Every fast path of a cluster at once: ahead, unix sockets, int8 and fp8.

Shapes by cost have tests of their own. Here they would leave it to how busy the machine was at
start-up whether a drafter that costs as much as its target is asked at all.
"""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from specinfer import AsyncClient, Capabilities, Completion
from specinfer.messages import SpeculationOptions
from specinfer_cli.cluster import ClusterSettings
from specinfer_cli.lossless_cases import Case, all_cases
from specinfer_cli.lossless_check import Checker, Tally
from specinfer_cli.lossless_paths import ALL_PATHS, CheckedPaths, apart, check_paths

# A cluster of processes takes a while on a busy machine.
pytestmark = pytest.mark.timeout(300)

PROMPTS = ("def add(a, b):", "What is this?")


class OtherSeed(Checker):
    """A cluster that draws other noise for one setting, with speculation on and off alike."""

    async def _generate(
        self, case: Case, speculation: SpeculationOptions, logprobs: int | None = None
    ) -> Completion:
        if case.setting == "temperature 1":
            case = dataclasses.replace(case, seed=case.seed + 1)
        return await super()._generate(case, speculation, logprobs)


@dataclasses.dataclass(frozen=True)
class Found:
    """Both clusters, and the second one's cases under a planted fault."""

    plain: CheckedPaths
    fast: CheckedPaths
    planted: CheckedPaths


@pytest.fixture(scope="module")
def found(tiny_settings: ClusterSettings) -> Found:
    """The plain paths and the fast ones, both with int8 weights and fp8 keys and values."""
    plain, _, int8, fp8, _ = ALL_PATHS
    small = dataclasses.replace(
        int8,
        verify=(*int8.verify, *fp8.verify),
        draft=(*int8.draft, *fp8.draft),
        router=plain.router,
    )
    ways = (
        dataclasses.replace(plain, target=small.target, verify=(*plain.verify, *small.verify)),
        small,
    )
    # A drafter that is the target guesses right: it goes ahead after every tree.
    settings = dataclasses.replace(
        tiny_settings, draft=tiny_settings.model, name="tiny", dtype="bfloat16"
    )
    planted: list[Tally] = []

    def check(address: str) -> tuple[Capabilities, Tally]:
        async def run(make: type[Checker]) -> tuple[Capabilities, Tally]:
            async with AsyncClient(address) as client:
                checker = make(client, chat=True, concurrency=8)
                tally = await checker.run(all_cases(PROMPTS, 1, 24), lambda _: None)
                return await client.capabilities(), tally

        planted.append(asyncio.run(run(OtherSeed))[1])
        return asyncio.run(run(Checker))

    first, second = check_paths(ways, settings, check)
    return Found(first, second, dataclasses.replace(second, tally=planted[-1]))


def test_no_path_changes_a_token(found: Found) -> None:
    for each in (found.plain, found.fast):
        assert each.tally.errors == [], each.paths.name
        assert each.tally.divergences == [], each.paths.name
        assert each.lossless, (each.paths.name, each.ahead_begun, each.tally)
    assert apart([found.plain, found.fast]) == []
    assert found.plain.ahead_begun == 0 < found.fast.ahead_begun


def test_negative_control_other_noise_is_seen_between_clusters(found: Found) -> None:
    """Within its cluster it is lossless; only another cluster of the same target can tell."""
    assert found.planted.tally.lossless
    assert apart([found.plain, found.planted]) == [found.fast.paths.name]


def test_negative_control_what_was_switched_on_and_never_used_is_no_proof(found: Found) -> None:
    assert not dataclasses.replace(found.fast, ahead_begun=0).lossless
