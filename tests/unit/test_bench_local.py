"""What `bench --in-process` and `bench --grow` stand on: the local router and grown targets."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from specinfer import InvalidRequest
from specinfer.messages import (
    ChatMessage,
    GenerateRequest,
    ShapeQuery,
    SpeculationOptions,
    TokensEvent,
)
from specinfer.sampling import SamplingParams, StopConditions
from specinfer_bench.grown import STALE_SECONDS, default_cache, grown_target
from specinfer_bench.local import compute_alone, local_router, run_local
from specinfer_bench.options import GROWN_PRESETS, BenchOptions
from specinfer_router.policy import StaticShape
from specinfer_router.router import Router
from specinfer_training import grow
from specinfer_training.grow import PRESETS, Shape, grow_checkpoint
from tests.kit.tiny_models import write_tiny_llama

# Twice the tiny Llama's sizes; its head size and vocabulary stay.
SMALL = Shape(hidden=128, layers=3, intermediate=256, heads=8, kv_heads=2)
SEED = 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("pair") / "target")


@pytest.fixture
def grown_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Presets that were grown, each to the small shape in place of its own."""
    calls: list[str] = []

    def small(source: Path, folder: Path, preset: str, dtype: torch.dtype) -> Path:
        calls.append(preset)
        return grow_checkpoint(source, folder, SMALL, dtype)

    monkeypatch.setattr(grow, "grow_checkpoint", small)
    return calls


async def run_plain(router: Router, prompt: str, options: BenchOptions) -> tuple[int, ...]:
    """The tokens without any guess."""
    request = GenerateRequest(
        messages=(ChatMessage("user", prompt),),
        sampling=SamplingParams(temperature=options.temperature, seed=SEED),
        stop=StopConditions(max_tokens=options.max_tokens),
        speculation=SpeculationOptions(enabled=False),
    )
    token_ids: list[int] = []
    async for event in router.generate(request):
        if isinstance(event, TokensEvent):
            token_ids.extend(event.token_ids)
    return tuple(token_ids)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_one_process_speculates_and_keeps_the_tokens(
    target: Path, tmp_path: Path, temperature: float
) -> None:
    draft = write_tiny_llama(tmp_path / "draft", noise=0.1)
    options = BenchOptions(max_tokens=32, temperature=temperature)
    # Timed by nothing: on passes of microseconds the adaptive policy may well choose no guesses.
    policy = StaticShape(ShapeQuery(max_nodes=8, max_depth=8))
    with local_router(target, draft, "float32", policy) as router:
        sample = await run_local(router, "What is this?", SEED, options)
        assert sample.token_ids == await run_plain(router, "What is this?", options)
    assert len(sample.token_ids) > 8
    assert sum(facts.num_accepted_tokens for facts in sample.rounds) > 0
    assert len(sample.rounds) < len(sample.token_ids)
    assert 0 < sample.first_token_seconds <= sample.seconds


def test_a_thread_that_computes_alone_leaves_the_others_their_number() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as alone, ThreadPoolExecutor(1) as later:
            alone.submit(compute_alone).result()
            # One that computes for the first time takes what was last set anywhere.
            numbers = [thread.submit(torch.get_num_threads).result() for thread in (alone, later)]
        assert [*numbers, torch.get_num_threads()] == [1, 3, 3]
    finally:
        torch.set_num_threads(before)


def test_a_grown_target_says_what_the_small_one_says(
    target: Path, tmp_path: Path, grown_calls: list[str]
) -> None:
    folder = grown_target(target, "200m", "float64", cache=tmp_path / "cache")
    small, large = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (target, folder)
    )
    assert large.config.hidden_size == SMALL.hidden
    prompt = torch.tensor([[1, 20, 40, 99]])
    with torch.no_grad():
        # transformers normalises in float32, so equality ends there.
        torch.testing.assert_close(large(prompt).logits, small(prompt).logits, rtol=0, atol=1e-4)
    assert grown_calls == ["200m"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_grown_target_is_made_once_for_each_source_preset_and_dtype(
    target: Path, tmp_path: Path, grown_calls: list[str]
) -> None:
    first = grown_target(target, "200m", "bfloat16", cache=tmp_path)
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert grown_target(target, "200m", "bfloat16", cache=tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made
    assert grown_calls == ["200m"]
    other_source = write_tiny_llama(tmp_path / "other" / "target", seed=7)
    others = {
        grown_target(target, "1b", "bfloat16", cache=tmp_path),
        grown_target(target, "200m", "float32", cache=tmp_path),
        grown_target(other_source, "200m", "bfloat16", cache=tmp_path),
    }
    assert len(others | {first}) == 4
    assert len(grown_calls) == 4


def test_what_was_left_long_ago_is_removed_and_what_others_make_now_is_not(
    target: Path, tmp_path: Path, grown_calls: list[str]
) -> None:
    made = grown_target(target, "200m", "bfloat16", cache=tmp_path)
    shutil.rmtree(made)
    left, going_on = (tmp_path / f".{made.name}-{name}" for name in ("left", "going"))
    for folder in (left, going_on):
        (folder / "grown").mkdir(parents=True)
    long_ago = time.time() - 2 * STALE_SECONDS
    os.utime(left, (long_ago, long_ago))
    assert grown_target(target, "200m", "bfloat16", cache=tmp_path) == made
    assert sorted(tmp_path.iterdir()) == sorted((going_on, made))


def test_what_cannot_be_grown_leaves_nothing(tmp_path: Path) -> None:
    wide = write_tiny_llama(tmp_path / "wide", num_heads=64, num_kv_heads=64, hidden_size=128)
    for source in (wide, tmp_path / "nowhere"):
        with pytest.raises(InvalidRequest) as caught:
            grown_target(source, "200m", "float32", cache=tmp_path / "cache")
        assert caught.value.field == "grow"
    assert list((tmp_path / "cache").iterdir()) == []


def test_presets_and_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(GROWN_PRESETS) == set(PRESETS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "specinfer" / "grown"
