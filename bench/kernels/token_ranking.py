"""The likeliest tokens of rows of logits, the native kernel against plain torch.

    python bench/kernels/token_ranking.py [--rounds N] [--threads N]

`topk` is torch.topk alone, without what turns values into scores. A ratio above 1 is slower than
our kernel.
"""

from collections.abc import Callable
from functools import partial

import torch
from timing import interleaved, parse_arguments, print_row

from specinfer_kernels import rank_tokens

CASES = [(1, 3072), (4, 3072), (1, 32000), (8, 32000), (16, 128000)]
COUNT = 4


def run_case(num_rows: int, vocab_size: int, rounds: int) -> None:
    z = torch.randn(num_rows, vocab_size) * 3
    rank = partial(rank_tokens, z, COUNT, 0.7)
    candidates: dict[str, Callable[[], object]] = {
        "ours": rank,
        "reference": partial(rank, backend="reference"),
        "topk": partial(torch.topk, z, COUNT, 1),
    }
    print_row(f"rank {num_rows} rows of {vocab_size}", interleaved(candidates, rounds), "ours")


def main() -> None:
    arguments = parse_arguments("token ranking")
    for num_rows, vocab_size in CASES:
        run_case(num_rows, vocab_size, arguments.rounds)


if __name__ == "__main__":
    main()
