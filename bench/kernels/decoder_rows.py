"""What a layer does to its rows between the products, against plain torch and against memory.

    python bench/kernels/decoder_rows.py [--rounds N] [--threads N] [--json FILE]

Each line is one op at the widths of the grown 200 M or 1.1 B model. `torch` is the op as few calls
of torch as it takes; `copy` copies a tensor of half the bytes that the op has to read and write, so
that it moves as many. A call is so short that a hundred are timed together. A ratio above 1 is
slower than ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from timing import interleaved, parse_arguments, print_row
from torch import Tensor
from torch.nn import functional

from results import add_json_option, save, summary_of
from specinfer_kernels import (
    RotaryPlaces,
    add_rms_norm,
    rms_norm,
    rotate_and_write_kv,
    silu_multiply,
)

HEAD_DIM, NUM_POSITIONS, BLOCK_SIZE, EPSILON = 64, 1024, 16, 1e-5
NUM_ROWS = (1, 8, 32, 256)
CALLS = 100

Candidates = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Shape:
    name: str
    width: int
    inner: int
    num_heads: int
    num_kv_heads: int


SHAPES = (Shape("200m", 1024, 2816, 16, 4), Shape("1b", 2048, 5632, 32, 4))


def copying(num_bytes: int) -> Callable[[], object]:
    """A copy that reads and writes so many bytes together."""
    source = torch.zeros(num_bytes // 8)
    return partial(torch.empty_like(source).copy_, source)


def norm_candidates(rows: Tensor, weight: Tensor) -> Candidates:
    return {
        "ours": partial(rms_norm, rows, weight, EPSILON),
        "torch": partial(functional.rms_norm, rows, weight.shape, weight, EPSILON),
        "copy": copying(2 * rows.numel() * rows.element_size()),
    }


def add_norm_candidates(rows: Tensor, weight: Tensor) -> Candidates:
    update, hidden = torch.zeros_like(rows), rows.clone()
    return {
        "ours": partial(add_rms_norm, hidden, update, weight, EPSILON),
        "torch": lambda: functional.rms_norm(hidden.add_(update), weight.shape, weight, EPSILON),
        "copy": copying(4 * rows.numel() * rows.element_size()),
    }


def gate_candidates(rows: Tensor) -> Candidates:
    gate, up = rows.chunk(2, 1)
    return {
        "ours": partial(silu_multiply, rows),
        "torch": lambda: functional.silu(gate) * up,
        "copy": copying(rows.numel() * rows.element_size() * 3 // 2),
    }


def turn_candidates(shape: Shape, num_rows: int, dtype: torch.dtype) -> Candidates:
    heads = shape.num_heads + 2 * shape.num_kv_heads
    mixed = torch.randn(num_rows, heads * HEAD_DIM).to(dtype)
    table = torch.randn(NUM_POSITIONS, HEAD_DIM).to(dtype)
    places = RotaryPlaces(torch.arange(num_rows), torch.arange(num_rows), table, table)
    cache = torch.zeros(NUM_POSITIONS // BLOCK_SIZE, BLOCK_SIZE, shape.num_kv_heads, HEAD_DIM)
    keys, values = cache.to(dtype), cache.to(dtype)
    split = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)

    def by_torch() -> Tensor:
        query, key, value = mixed.view(num_rows, -1, HEAD_DIM).split(split, 1)
        cosines, sines = table[places.positions, None], table[places.positions, None]
        query, key = (turned(part, cosines, sines) for part in (query, key))
        keys.flatten(0, 1)[places.slot_mapping] = key
        values.flatten(0, 1)[places.slot_mapping] = value
        return query

    return {
        "ours": partial(rotate_and_write_kv, mixed, places, keys, values),
        "torch": by_torch,
        "copy": copying(2 * mixed.numel() * mixed.element_size()),
    }


def turned(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = heads.chunk(2, 2)
    return heads * cosines + torch.cat((-second, first), 2) * sines


def repeated(run: Callable[[], object]) -> None:
    for _ in range(CALLS):
        run()


def run_shape(
    shape: Shape, dtype: torch.dtype, num_rows: int, rounds: int
) -> list[dict[str, object]]:
    """A line for each op."""
    rows = torch.randn(num_rows, shape.width).to(dtype)
    weight = torch.ones(shape.width, dtype=dtype)
    ops = {
        "rms_norm": norm_candidates(rows, weight),
        "add_rms_norm": add_norm_candidates(rows, weight),
        "silu_multiply": gate_candidates(torch.randn(num_rows, 2 * shape.inner).to(dtype)),
        "rotate_and_write_kv": turn_candidates(shape, num_rows, dtype),
    }
    lines = []
    for op, candidates in ops.items():
        calls = {name: partial(repeated, run) for name, run in candidates.items()}
        seconds = interleaved(calls, rounds)
        seconds = {name: [took / CALLS for took in times] for name, times in seconds.items()}
        name = str(dtype).removeprefix("torch.")
        print_row(f"{name} {shape.name} {op}, {num_rows} rows", seconds, "ours")
        lines.append(
            {"op": op, "shape": shape.name, "dtype": name, "rows": num_rows}
            | summary_of(seconds, "ours")
        )
    return lines


def main() -> None:
    arguments = parse_arguments("decoder rows", add_json_option)
    lines = []
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            for shape in SHAPES:
                for num_rows in NUM_ROWS:
                    lines += run_shape(shape, dtype, num_rows, arguments.rounds)
    save(arguments, lines)


if __name__ == "__main__":
    main()
