"""Whole trees as one CUDA graph: those that are grown level by level."""

from collections.abc import Sequence

import pytest
import torch

from specinfer.tree import TokenTree
from specinfer_engine.graphs import CudaCapture
from specinfer_engine.loader import load_model
from specinfer_engine.model import LoadedModel
from tests.kit.tiny_models import write_tiny_llama
from tests.kit.whole_trees import CUT, GREEDY, SAMPLED, drafter_of, rounds, shape_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda:0")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A Llama with grouped heads on the device."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("growth"), hidden_size=256, num_layers=3)
    return load_model(folder, dtype=request.param, device=DEVICE)


def tokens_of(trees: Sequence[TokenTree]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Scores are sums over the vocabulary, whose order torch chooses by the number of rows."""
    return [(tree.token_ids, tree.parents) for tree in trees]


@pytest.mark.parametrize("widths", [(1,) * 6, (3, 2, 1), (2, 2, 2)], ids=str)
def test_a_tree_is_that_of_the_levels(loaded: LoadedModel, widths: tuple[int, ...]) -> None:
    samplings, shape = [SAMPLED, GREEDY, CUT, SAMPLED, GREEDY], shape_of(widths)
    expected, num_passes = rounds(drafter_of(loaded), samplings, [shape])
    bench = drafter_of(loaded, CudaCapture(DEVICE))
    found, num_whole = rounds(bench, samplings, [shape])
    assert tokens_of(found) == tokens_of(expected)
    for mine, its in zip(found, expected, strict=True):
        assert mine.scores == pytest.approx(its.scores, abs=1e-4)
    assert bench.growths is not None
    assert bench.growths.num_recorded == 2
    assert num_passes == num_whole * len(widths)
