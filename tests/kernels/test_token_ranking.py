"""The likeliest tokens of every row: C++ against plain torch, rows alone, ties, what is cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from specinfer_kernels import Backend, KernelInputError, available_backends, rank_tokens

BACKENDS = available_backends()

native_only = pytest.mark.skipif("native" not in BACKENDS, reason="no native library")


def random_rows(num_rows: int, vocab_size: int) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(1)) * 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (4, 3072), (2, 5003)])
@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize("spread", [1.0, 0.3, 2.0])
def test_tokens_and_scores_are_those_of_the_softmax(
    backend: Backend, shape: tuple[int, int], count: int, spread: float
) -> None:
    z = random_rows(*shape)
    tokens, scores = rank_tokens(z, count, spread, backend=backend)
    count = min(count, shape[1])
    expected = torch.log_softmax(z.double() / spread, 1)
    order = z.argsort(dim=1, descending=True, stable=True)[:, :count]
    assert torch.equal(tokens.long(), order)
    assert torch.allclose(scores, expected.gather(1, order), atol=2e-5)


@native_only
def test_a_row_has_the_same_bits_in_any_company() -> None:
    z = random_rows(9, 2030)[:, :2001]  # rows that do not lie side by side
    together = rank_tokens(z, 5, 0.7)
    torch.set_num_threads(3)
    assert torch.equal(rank_tokens(z, 5, 0.7), together)
    for row in range(9):
        assert torch.equal(rank_tokens(z[row : row + 1], 5, 0.7)[:, 0], together[:, row])
    assert rank_tokens(z[:0], 5, 0.7).shape == (2, 0, 5)
    assert torch.equal(rank_tokens(z.T.contiguous().T, 5, 0.7), together)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_drawn_never_has_a_score(backend: Backend) -> None:
    z = torch.full((2, 600), -math.inf)
    z[0, [17, 599]] = torch.tensor([1.0, 2.0])
    tokens, scores = rank_tokens(z, 4, backend=backend)
    assert tokens[0, :2].tolist() == [599, 17]
    assert scores[0, :2].exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    assert not (scores[0, 2:] > -math.inf).any()
    assert not (scores[1] > -math.inf).any()


@native_only
def test_of_equal_tokens_the_lower_come_first() -> None:
    z = torch.zeros(1, 700)
    z[0, [300, 650, 699]] = 1.0
    tokens, _ = rank_tokens(z, 5, backend="native")
    assert tokens.tolist() == [[300, 650, 699, 0, 1]]


def test_refuses_bad_input() -> None:
    z = torch.zeros(2, 5)
    for rows, count, spread in (
        (z.double(), 1, 1.0),
        (z[0], 1, 1.0),
        (z[:, :0], 1, 1.0),
        (z, 0, 1.0),
        (z, 1, 0.0),
        (z, 1, math.nan),
    ):
        with pytest.raises(KernelInputError):
            rank_tokens(rows, count, spread)
