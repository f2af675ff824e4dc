"""Gumbel noise and sampling, the native kernels against plain torch.

    python bench/kernels/seeded_sampling.py [--rounds N] [--threads N]

`argmax` is torch.argmax of the logits alone. A ratio above 1 is slower than our kernel.
"""

from functools import partial

import torch
from timing import interleaved, parse_arguments, print_row

from specinfer_kernels import draw_row, gumbel_noise, sample_gumbel

CASES = [(1, 8192), (8, 8192), (1, 32000), (8, 32000), (16, 128000)]


def run_case(num_rows: int, vocab_size: int, rounds: int) -> None:
    logits = torch.randn(num_rows, vocab_size) * 3
    seeds, positions = torch.arange(num_rows), torch.arange(num_rows) + 100
    sampled = torch.zeros(num_rows, dtype=torch.bool)
    label = f"{num_rows} rows of {vocab_size}"
    sample = partial(sample_gumbel, logits, seeds, positions, sampled)
    candidates = {
        "ours": sample,
        "reference": partial(sample, backend="reference"),
        "argmax": partial(torch.argmax, logits, 1),
    }
    print_row(f"sample {label}", interleaved(candidates, rounds), "ours")
    one = partial(draw_row, logits[0], 0, 100, greedy=False)
    draws = {"ours": one, "reference": partial(one, backend="reference")}
    print_row(f"draw 1 row of {vocab_size}", interleaved(draws, rounds), "ours")
    noise = partial(gumbel_noise, seeds, positions, vocab_size)
    candidates = {"ours": noise, "reference": partial(noise, backend="reference")}
    print_row(f"noise {label}", interleaved(candidates, rounds), "ours")


def main() -> None:
    arguments = parse_arguments("sampling")
    for num_rows, vocab_size in CASES:
        run_case(num_rows, vocab_size, arguments.rounds)


if __name__ == "__main__":
    main()
