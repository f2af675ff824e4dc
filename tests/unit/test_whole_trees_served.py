"""Workers as they are built for a device that records: whole trees change no token."""

from __future__ import annotations

from pathlib import Path

import pytest

from specinfer.messages import ChatMessage, GenerateRequest, ShapeQuery, SpeculationOptions
from specinfer.sampling import SamplingParams, StopConditions
from specinfer.tree import TokenTree
from specinfer_bench.local import router_over, run_request, running
from specinfer_bench.measure import Sample
from specinfer_draft.drafters import whole_trees
from specinfer_draft.drafters.search import TreeSearch
from specinfer_draft.drafters.static_growth import Levels
from specinfer_draft.settings import Settings as DraftSettings
from specinfer_draft.worker import build_worker as build_drafter
from specinfer_engine import served
from specinfer_router.policy import StaticShape
from specinfer_verify.settings import Settings as VerifySettings
from specinfer_verify.worker import build_worker as build_verifier
from tests.kit.recorded_passes import Recorder
from tests.kit.threads import one_thread as one_thread
from tests.kit.tiny_models import write_tiny_llama

SAMPLINGS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, seed=7),
    SamplingParams(temperature=0.9, top_k=20, seed=8),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and a drafter that often agrees with it."""
    folder = tmp_path_factory.mktemp("served")
    return write_tiny_llama(folder / "target"), write_tiny_llama(folder / "draft", noise=0.1)


async def samples(pair: tuple[Path, Path], speculation: bool) -> list[Sample]:
    """One prompt, drawn by several laws."""
    verifier = build_verifier(
        VerifySettings(model=pair[0], dtype="float32", kv_blocks=128, profile="off")
    )
    drafter = build_drafter(
        DraftSettings(model=pair[1], dtype="float32", kv_blocks=128, profile="off")
    )
    with running(verifier.engine), running(drafter.engine):
        router = router_over(verifier, drafter, policy=StaticShape(ShapeQuery(8, 3, (2, 1, 2))))
        return [
            await run_request(
                router,
                GenerateRequest(
                    messages=(ChatMessage("user", "What is this?"),),
                    sampling=sampling,
                    stop=StopConditions(max_tokens=16),
                    speculation=SpeculationOptions(enabled=speculation),
                ),
            )
            for sampling in SAMPLINGS
        ]


async def test_whole_trees_change_no_token_and_are_what_is_verified(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = await samples(pair, speculation=False)
    by_level = await samples(pair, speculation=True)
    monkeypatch.setattr(served, "capture_for", lambda *arguments: Recorder())
    # As if recordings took no time: the deadlines here are short.
    monkeypatch.setattr(whole_trees, "RECORD_SECONDS", 0.0)
    grown = list[TokenTree]()
    take_tree = TreeSearch.take_tree

    def count(search: TreeSearch, levels: Levels) -> None:
        take_tree(search, levels)
        grown.append(search.result())

    monkeypatch.setattr(TreeSearch, "take_tree", count)
    whole = await samples(pair, speculation=True)
    for one, other, third in zip(plain, by_level, whole, strict=True):
        assert one.token_ids == other.token_ids == third.token_ids
        accepted = [
            [facts.num_accepted_tokens for facts in sample.rounds] for sample in (other, third)
        ]
        assert accepted[0] == accepted[1]
        assert sum(accepted[1]) > 0
    # Near the end of an answer trees are cut to what is left of it.
    num_rounds = sum(len(sample.rounds) for sample in whole)
    assert num_rounds - 2 * len(SAMPLINGS) <= len(grown) <= num_rounds
