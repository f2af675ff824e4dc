"""Row-invariant linear layers against their floor, F.linear and oneDNN's packed form.

    python bench/kernels/packed_linear.py [--rounds N] [--threads N] [--rows 1,8,32] [--json FILE]

Each line is one product at a shape of the grown 200 M or 1.1 B model, over copies of the weight
that together are larger than the caches. The floor is the larger of reading those weights once and
of the arithmetic at the rate of a large matrix product, both measured in the same rounds; `int8` is
held against the floor of the bfloat16 weight. Ratios are medians over rounds: of ours to the floor,
and of the others to ours (above 1 is slower).
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from timing import PEAK_SIZE, interleaved, parse_arguments, peak_candidates, pop_peaks
from torch import Tensor
from torch.nn import functional

from results import add_json_option, save
from specinfer_kernels import pack_linear
from specinfer_kernels.packed_linear import layouts

# (in, out) of gate and up, down, query with key and value, and output.
SHAPES = {
    "1b": [(2048, 11264), (5632, 2048), (2048, 2560), (2048, 2048)],
    "200m": [(1024, 5632), (2816, 1024), (1024, 1536), (1024, 1024)],
}
NUM_ROWS = "1,2,4,8,12,16,24,32,64,256"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COPIES_BYTES = 96 << 20


Ways = dict[str, list[Callable[[Tensor], object]]]


def pack_all(weights: Sequence[Tensor]) -> Ways:
    """Every way to multiply rows by each of the weights, and how to read them."""
    ways: Ways = {
        "ours": [pack_linear(weight) for weight in weights],
        "F.linear": [partial(functional.linear, weight=weight) for weight in weights],
    }
    served = layouts(weights[0])
    if "onednn" in served and served[0] != "onednn":
        ways["onednn"] = [pack_linear(weight, layout="onednn") for weight in weights]
    ways["int8"] = [pack_linear(weight, int8=True) for weight in weights]
    ways["read"] = [partial(read, weight.view(torch.float32)) for weight in weights]
    return ways


def read(weight: Tensor, _rows: Tensor) -> Tensor:
    return weight.sum()


def each(calls: Sequence[Callable[[Tensor], object]], rows: Tensor) -> None:
    for call in calls:
        call(rows)


def run_shape(
    shape: tuple[int, int], dtype: torch.dtype, all_num_rows: Sequence[int], rounds: int
) -> list[dict[str, object]]:
    """A line for each number of rows."""
    lines: list[dict[str, object]] = []
    in_features, out_features = shape
    copies = max(1, COPIES_BYTES // (in_features * out_features * dtype.itemsize))
    weights = [torch.randn(out_features, in_features).to(dtype) * 0.02 for _ in range(copies)]
    ways = pack_all(weights)
    for num_rows in all_num_rows:
        rows = torch.randn(num_rows, in_features).to(dtype)
        candidates = {name: partial(each, calls, rows) for name, calls in ways.items()}
        seconds = interleaved({**candidates, **peak_candidates(dtype)}, rounds)
        lines.append(facts_of(shape, dtype, num_rows, copies, seconds))
        print("  ".join(f"{name} {value}" for name, value in lines[-1].items()), flush=True)
    return lines


def facts_of(
    shape: tuple[int, int],
    dtype: torch.dtype,
    num_rows: int,
    copies: int,
    seconds: dict[str, list[float]],
) -> dict[str, object]:
    """What one product took, per copy, against its floor and the other ways."""
    in_features, out_features = shape
    num_bytes = in_features * out_features * dtype.itemsize
    operations = 2 * num_rows * in_features * out_features * copies
    peaks = [2 * PEAK_SIZE**3 / took for took in pop_peaks(seconds)]
    reads = seconds.pop("read")
    floors = [max(read, operations / peak) for read, peak in zip(reads, peaks, strict=True)]
    ours = seconds.pop("ours")
    facts: dict[str, object] = {
        "product": f"{in_features} to {out_features}",
        "rows": num_rows,
        "ms": round(statistics.median(ours) / copies * 1e3, 4),
        "read GB/s": round(num_bytes * copies / statistics.median(reads) / 1e9, 1),
        "peak GFLOP/s": round(statistics.median(peaks) / 1e9),
        "over floor": median_ratio(ours, floors),
        "int8 over floor": median_ratio(seconds.pop("int8"), floors),
    }
    return facts | {f"{name} over ours": median_ratio(took, ours) for name, took in seconds.items()}


def median_ratio(mine: Sequence[float], its: Sequence[float]) -> float:
    return round(statistics.median(one / other for one, other in zip(mine, its, strict=True)), 2)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", default=NUM_ROWS, help="numbers of rows, with commas")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--model", default="1b", choices=sorted(SHAPES))
    add_json_option(parser)


def main() -> None:
    arguments = parse_arguments("linear", add_options)
    all_num_rows = [int(num_rows) for num_rows in arguments.rows.split(",")]
    lines = []
    with torch.inference_mode():
        for shape in SHAPES[arguments.model]:
            lines += run_shape(shape, DTYPES[arguments.dtype], all_num_rows, arguments.rounds)
    save(arguments, lines)


if __name__ == "__main__":
    main()
