"""A tiny pair on a CUDA device: the same bits with CUDA graphs and without, the same tokens with
speculation and without."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from specinfer.messages import (
    ChatMessage,
    GenerateRequest,
    ShapeQuery,
    SpeculationOptions,
)
from specinfer.sampling import SamplingParams, StopConditions
from specinfer_bench.local import router_over, run_request, running
from specinfer_bench.measure import Sample
from specinfer_draft.settings import Settings as DraftSettings
from specinfer_draft.worker import build_worker as build_drafter
from specinfer_engine.graphs import CudaCapture
from specinfer_engine.loader import load_model
from specinfer_engine.rowwise import apply_elementwise
from specinfer_router.policy import StaticShape
from specinfer_verify.settings import Settings as VerifySettings
from specinfer_verify.worker import build_worker as build_verifier
from tests.kit.recorded_passes import differing_passes
from tests.kit.tiny_models import write_tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda:0")
DTYPES = ("float32", "bfloat16")
# Of weights, and of keys and values.
KINDS = (("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "fp8"))
MAX_TOKENS = 24
SHAPES = (ShapeQuery(max_nodes=8, max_depth=4), ShapeQuery(8, 3, (2, 1, 2)))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and a drafter that often agrees with it."""
    folder = tmp_path_factory.mktemp("pair")
    # As long as the contexts of `recorded_passes`.
    write = partial(write_tiny_llama, hidden_size=256, num_layers=3, max_model_len=1024)
    target = write(folder / "target")
    return target, write(folder / "draft", noise=0.1)


class CountingCapture(CudaCapture):
    """Counts the passes that it recorded."""

    num_recorded = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        replay = super().__call__(step)
        self.num_recorded += 1
        return replay


@pytest.mark.parametrize(("dtype", "kv_dtype"), KINDS)
def test_recorded_passes_give_the_bits_of_plain_ones(
    pair: tuple[Path, Path], dtype: str, kv_dtype: str
) -> None:
    loaded = load_model(pair[0], dtype=dtype, device=DEVICE, kv_dtype=kv_dtype)
    assert loaded.row_invariant
    capture = CountingCapture(DEVICE)
    assert differing_passes(loaded, capture, 40) == []
    assert capture.num_recorded > 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [torch.tanh, functional.gelu, functional.silu])
def test_elements_have_their_bits_wherever_they_lie(
    function: Callable[[Tensor], Tensor], dtype: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(70, 1003, generator=generator).to(getattr(torch, dtype)).to(DEVICE)
    together = apply_elementwise(function, values)
    for start, count in ((0, 1), (69, 1), (3, 5), (7, 40)):
        rows = apply_elementwise(function, values[start : start + count])
        assert torch.equal(rows, together[start : start + count])


@pytest.mark.parametrize("shape", SHAPES, ids=["best-first", "whole"])
@pytest.mark.parametrize("kind", KINDS)
async def test_speculation_and_graphs_change_no_token(
    pair: tuple[Path, Path], kind: tuple[str, str], shape: ShapeQuery
) -> None:
    plain, guessed = [], []
    for graphs in ("off", "auto"):
        for sample in await samples(pair, kind, graphs, shape, speculation=False):
            plain.append(sample.token_ids)
        for sample in await samples(pair, kind, graphs, shape, speculation=True):
            guessed.append(sample.token_ids)
            assert sum(facts.num_accepted_tokens for facts in sample.rounds) > 0
    assert guessed == plain
    assert plain[: len(plain) // 2] == plain[len(plain) // 2 :]


async def samples(
    pair: tuple[Path, Path],
    kind: tuple[str, str],
    graphs: str,
    shape: ShapeQuery,
    speculation: bool,
) -> list[Sample]:
    """Two prompts, greedily and drawn, through a router over workers of the device."""
    common: dict[str, Any] = {"dtype": kind[0], "kv_dtype": kind[1], "device": str(DEVICE)}
    common |= {"kv_blocks": 256, "cuda_graphs": graphs, "profile": "off"}
    verify = VerifySettings(model=pair[0], **common)
    draft = DraftSettings(model=pair[1], **common)
    verifier, drafter = build_verifier(verify), build_drafter(draft)
    policy = StaticShape(shape)
    with running(verifier.engine), running(drafter.engine):
        router = router_over(verifier, drafter, policy=policy)
        return [
            await run_request(
                router,
                GenerateRequest(
                    messages=(ChatMessage("user", prompt),),
                    sampling=SamplingParams(temperature=temperature, seed=7),
                    stop=StopConditions(max_tokens=MAX_TOKENS),
                    speculation=SpeculationOptions(enabled=speculation),
                ),
            )
            for prompt in ("What is this?", "And that")
            for temperature in (0.0, 0.8)
        ]
