"""Draws by seeded noise follow the law, jointly over positions; noise used twice is seen."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from specinfer.tree import TokenTree
from specinfer_engine import acceptance
from specinfer_engine.acceptance import draw_token, match_walk
from tests.kit.table_models import TableModel, tree_laws

VOCAB = 3
NUM_SEEDS = 4000
PROMPT = (1, 2)


def joint_counts(num_guesses: int) -> torch.Tensor:
    """How often each pair of first two tokens comes over NUM_SEEDS seeds, [VOCAB, VOCAB]."""
    model = TableModel(VOCAB, seed=3)
    counts = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for seed in range(NUM_SEEDS):
        tokens = list(PROMPT)
        while len(tokens) < len(PROMPT) + 2:
            guesses = tuple(range(num_guesses))
            tree = TokenTree((tokens[-1], *guesses), (-1, *([0] * num_guesses)))

            laws = tree_laws(model, tokens, tree)
            walk = match_walk(tree, laws, base_len=len(tokens) - 1, seed=seed, greedy=False)
            tokens += [*(tree.token_ids[node] for node in walk.path), walk.tail]
        counts[tokens[2], tokens[3]] += 1
    return counts


def chi_square_p_value(counts: torch.Tensor) -> float:
    """P-value of the joint counts under the target's law; 8 degrees of freedom."""
    model = TableModel(VOCAB, seed=3)
    first = model.logits(PROMPT).double().softmax(0)
    expected = torch.stack(
        [first[t] * model.logits([*PROMPT, t]).double().softmax(0) for t in range(VOCAB)]
    )
    expected *= NUM_SEEDS
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # For 2k degrees of freedom: exp(-x/2) * sum_{i<k} (x/2)^i / i!.
    half = statistic / 2
    return math.exp(-half) * sum(half**i / math.factorial(i) for i in range(4))


@pytest.mark.parametrize("num_guesses", [0, 1, 3])
def test_first_two_tokens_follow_the_target(num_guesses: int) -> None:
    assert chi_square_p_value(joint_counts(num_guesses)) > 1e-3


def test_the_tree_changes_no_draw() -> None:
    assert torch.equal(joint_counts(0), joint_counts(2))


@pytest.mark.parametrize(
    "position",
    [lambda base_len, depth: 0, lambda base_len, depth: (base_len + depth + 1) // 2],
    ids=["one noise for all", "one noise for two"],
)
def test_noise_reused_between_positions_is_seen(
    position: Callable[[int, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "decided_position", position)
    assert chi_square_p_value(joint_counts(0)) < 1e-6


def test_one_draw_follows_its_law() -> None:
    law = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = [draw_token(law, seed, 17, greedy=False) for seed in range(NUM_SEEDS)]
    shares = torch.bincount(torch.tensor(draws), minlength=4).double() / NUM_SEEDS
    # Five standard deviations of a share near one half.
    torch.testing.assert_close(shares, law.double().exp(), atol=5 * 0.5 / NUM_SEEDS**0.5, rtol=0)
