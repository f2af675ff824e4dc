"""Row-invariant linear layers on a GPU against cuBLAS, whose bits follow the number of rows.

    python bench/kernels/gpu_linear.py [--rounds N] [--output FILE] [--check]

Each line is one product of a 7B shape. The floor reads weight and rows and writes the result, or
does the arithmetic at the measured matrix rate, whichever takes longer. `cublas` is `F.linear`,
whose kernel follows the number of rows: its time over ours is the price of row-invariance. `blocks`
is `F.linear` in row blocks of one size, what serves without Triton. `int8` reads half the weight.
Each shape ends with how many rows have other bits alone than among the others.
"""

from collections.abc import Callable
from functools import partial

import torch
from gpu_timing import Bench, Work, parse
from torch import Tensor
from torch.nn import functional

from specinfer_kernels import pack_linear

# (in, out) of query with key and value, output, gate and up, down, and the head.
SHAPES = ((4096, 6144), (4096, 4096), (4096, 22016), (11008, 4096), (4096, 32000))
SMALL_SHAPES = ((96, 130),)
ROW_COUNTS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
# A float32 layer has no tensor core, and is there for tests of losslessness.
FEW_ROW_COUNTS = (1, 64)
Linear = Callable[[Tensor], Tensor]


def shape_rows(
    bench: Bench, shape: tuple[int, int], dtype: torch.dtype, row_counts: tuple[int, ...]
) -> None:
    """A line for each number of rows, and one about bits."""
    in_features, out_features = shape
    weight = torch.randn(out_features, in_features, device=bench.device).to(dtype)
    weight *= in_features**-0.5
    ways: dict[str, Linear] = {
        "ours": pack_linear(weight),
        "cublas": partial(functional.linear, weight=weight),
        "blocks": pack_linear(weight, layout="plain"),
        "int8": pack_linear(weight, int8=True),
    }
    name = str(dtype).removeprefix("torch.")
    most = torch.randn(max(row_counts), in_features, device=bench.device).to(dtype)
    for num_rows in row_counts:
        rows = most[:num_rows]
        candidates = {way: partial(linear, rows) for way, linear in ways.items()}
        label = f"{in_features} to {out_features}, {name}, {num_rows} rows"
        bench.measure(label, work_of(shape, dtype, num_rows), candidates, {})
    print_changed_bits(ways, most[:64])


def work_of(shape: tuple[int, int], dtype: torch.dtype, num_rows: int) -> Work:
    """Weight, rows and result once."""
    in_features, out_features = shape
    elements = in_features * out_features + num_rows * (in_features + out_features)
    operations = 2 * num_rows * in_features * out_features
    return Work(elements * dtype.itemsize, operations, dtype)


def print_changed_bits(ways: dict[str, Linear], rows: Tensor) -> None:
    """Rows whose result alone is not what it is among the others."""
    counts = []
    for name, linear in ways.items():
        together = linear(rows)
        alone = torch.cat([linear(rows[index : index + 1]) for index in range(len(rows))])
        changed = int((together != alone).any(1).sum())
        counts.append(f"{name} {changed}")
    print(f"    of {len(rows)} rows have other bits alone: {', '.join(counts)}", flush=True)


def main() -> None:
    """All shapes in bfloat16, and one in float16 and float32."""
    bench = Bench("linear", parse("linear layers on a GPU"))
    row_counts = (3,) if bench.check else ROW_COUNTS
    with torch.inference_mode():
        for shape in SMALL_SHAPES if bench.check else SHAPES:
            shape_rows(bench, shape, torch.bfloat16, row_counts)
        shape = SMALL_SHAPES[0] if bench.check else SHAPES[1]
        shape_rows(bench, shape, torch.float16, row_counts)
        shape_rows(bench, shape, torch.float32, (3,) if bench.check else FEW_ROW_COUNTS)
    bench.finish()


if __name__ == "__main__":
    main()
