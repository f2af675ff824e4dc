"""KV moves: native writes against torch's index_copy_, and compaction of an accepted path.

    python bench/kernels/kv_cache.py [--rounds N] [--threads N]

A ratio above 1 is slower than our kernel.
"""

from functools import partial

import torch
from timing import interleaved, parse_arguments, print_row

from specinfer_kernels import compact_kv, write_kv

NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM = 22, 64, 16, 4, 64


def main() -> None:
    arguments = parse_arguments("KV moves")
    shape = (NUM_LAYERS, 2, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    pool = torch.zeros(shape, dtype=torch.bfloat16)
    for num_rows in (1, 8, 256):
        rows = torch.randn(num_rows, NUM_KV_HEADS, HEAD_DIM).bfloat16()
        slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:num_rows]
        write = partial(write_kv, rows, rows, pool[0, 0], pool[0, 1], slots)
        candidates = {"ours": write, "reference": partial(write, backend="reference")}
        label = f"write {num_rows} rows, one layer"
        print_row(label, interleaved(candidates, arguments.rounds), "ours")
    for count in (1, 4, 8):
        targets = torch.arange(count) + 101
        move = partial(compact_kv, pool, targets + 3, targets)
        label = f"compact {count} of {NUM_LAYERS} layers"
        print_row(label, interleaved({"ours": move}, arguments.rounds), "ours")


if __name__ == "__main__":
    main()
