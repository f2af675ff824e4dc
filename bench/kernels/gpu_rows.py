"""Norms, gates, rotary positions with the KV write, and compaction on a GPU, at a 7B shape.

    python bench/kernels/gpu_rows.py [--rounds N] [--output FILE] [--check]

`torch` is the plain-torch reference. The floor counts every byte once. Goal: near one floor from
64 rows on; below that a launch is all there is.
"""

from functools import partial

import torch
from gpu_timing import Bench, Work, parse
from torch import Tensor

from specinfer_kernels import (
    RotaryPlaces,
    add_rms_norm,
    compact_kv,
    rotate_and_write_kv,
    silu_multiply,
)

HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4096, 11008, 32, 8, 128
NUM_LAYERS, BLOCK_SIZE, NUM_BLOCKS = 32, 16, 256
ROW_COUNTS = (1, 8, 64, 256)
DTYPE = torch.bfloat16
SIZE = DTYPE.itemsize


def make(bench: Bench, *shape: int) -> Tensor:
    """Random values on the bench's device."""
    return torch.randn(shape, device=bench.device).to(DTYPE)


def norm(bench: Bench, num_rows: int) -> None:
    """The residual stream and its norm, in one op."""
    hidden, update, weight = (make(bench, *shape) for shape in _norm_shapes(num_rows))
    run = partial(add_rms_norm, hidden, update, weight, 1e-5)
    candidates = {"ours": run, "torch": partial(run, backend="reference")}
    work = Work(4 * num_rows * HIDDEN * SIZE)
    bench.measure(f"norm with the residual, {num_rows} rows of {HIDDEN}", work, candidates, {})


def _norm_shapes(num_rows: int) -> tuple[tuple[int, ...], ...]:
    return ((num_rows, HIDDEN), (num_rows, HIDDEN), (HIDDEN,))


def gate(bench: Bench, num_rows: int) -> None:
    """SwiGLU of the joined product."""
    run = partial(silu_multiply, make(bench, num_rows, 2 * INTERMEDIATE))
    candidates = {"ours": run, "torch": partial(run, backend="reference")}
    work = Work(3 * num_rows * INTERMEDIATE * SIZE)
    bench.measure(f"gate, {num_rows} rows of {INTERMEDIATE}", work, candidates, {})


def rotary(bench: Bench, num_rows: int) -> None:
    """Queries turned; keys turned and, with the values, written to scattered slots."""
    all_heads = NUM_HEADS + 2 * NUM_KV_HEADS
    mixed = make(bench, num_rows, all_heads * HEAD_DIM)
    keys, values = (make(bench, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM) for _ in range(2))
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, device=bench.device)[:num_rows]
    tables = [make(bench, 4096, HEAD_DIM) for _ in range(2)]
    places = RotaryPlaces(torch.arange(num_rows, device=bench.device), slots, *tables)
    run = partial(rotate_and_write_kv, mixed, places, keys, values)
    candidates = {"ours": run, "torch": partial(run, backend="reference")}
    work = Work(2 * num_rows * (all_heads + 1) * HEAD_DIM * SIZE)
    bench.measure(f"rotary and KV write, {num_rows} rows", work, candidates, {})


def compaction(bench: Bench, num_moves: int) -> None:
    """Accepted rows moved together, in all layers at once."""
    layers = 2 if bench.check else NUM_LAYERS
    pool = make(bench, layers, 2, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    sources = torch.arange(num_moves, device=bench.device) * 3 + 2
    targets = torch.arange(num_moves, device=bench.device) * 3 + 1
    run = partial(compact_kv, pool, sources, targets)
    candidates = {"ours": run, "torch": partial(run, backend="reference")}
    work = Work(4 * layers * num_moves * NUM_KV_HEADS * HEAD_DIM * SIZE)
    bench.measure(f"compaction of {num_moves} rows in {layers} layers", work, candidates, {})


def main() -> None:
    """All kernels for all numbers of rows."""
    bench = Bench("rows", parse("decoder rows on a GPU"))
    for num_rows in (3,) if bench.check else ROW_COUNTS:
        for measure in (norm, gate, rotary, compaction):
            measure(bench, num_rows)
    bench.finish()


if __name__ == "__main__":
    main()
