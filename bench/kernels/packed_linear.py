"""Row-invariant linear layers against F.linear.

    python bench/kernels/packed_linear.py [--rounds N] [--threads N]

`memory` reads the weight once. A ratio above 1 is slower than our layer.
"""

from functools import partial

import torch
from timing import interleaved, parse_arguments, print_row
from torch.nn import functional

from specinfer_kernels import pack_linear

SHAPES = [(2048, 5632), (5632, 2048), (2048, 256), (512, 1376)]
NUM_ROWS = (1, 4, 8, 12, 16, 32, 256)


def run_shape(in_features: int, out_features: int, dtype: torch.dtype, rounds: int) -> None:
    weight = torch.randn(out_features, in_features).to(dtype) * 0.02
    layer = pack_linear(weight)
    for num_rows in NUM_ROWS:
        rows = torch.randn(num_rows, in_features).to(dtype)
        candidates = {
            "ours": partial(layer, rows),
            "F.linear": partial(functional.linear, rows, weight),
            "memory": partial(torch.sum, weight.view(torch.float32)),
        }
        name = str(dtype).removeprefix("torch.")
        label = f"{name} {in_features} to {out_features}, {num_rows} rows"
        print_row(label, interleaved(candidates, rounds), "ours")


def main() -> None:
    arguments = parse_arguments("linear")
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            for in_features, out_features in SHAPES:
                run_shape(in_features, out_features, dtype, arguments.rounds)


if __name__ == "__main__":
    main()
