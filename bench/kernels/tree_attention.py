"""Tree attention against torch's fused attention and the plain-torch reference, one layer.

    python bench/kernels/tree_attention.py [--rounds N] [--threads N] [--json FILE]

`sdpa` gets the keys gathered and the mask made beforehand: it pays for neither pages nor trees.
`memory` reads the keys and values once. A ratio above 1 is slower than our kernel.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from timing import interleaved, parse_arguments, print_row
from torch import Tensor
from torch.nn import functional

from results import add_json_option, save, summary_of
from specinfer_kernels import AttentionLayout, available_backends, tree_attention

HEAD_DIM, BLOCK_SIZE = 64, 16
REFERENCE_LIMIT = 1 << 14  # rows times keys beyond which the reference is left out


@dataclass(frozen=True)
class Case:
    context: int
    num_rows: int
    num_heads: int
    num_kv_heads: int
    chain: bool

    @property
    def label(self) -> str:
        form = "chain" if self.chain else "tree"
        heads = f"{self.num_heads}/{self.num_kv_heads} heads"
        return f"{form} of {self.num_rows} after {self.context}, {heads}"


CASES = [
    *(Case(512, rows, 32, 4, chain=False) for rows in (1, 4, 8, 16)),
    Case(128, 8, 32, 4, chain=False),
    *(Case(context, rows, 32, 4, chain=False) for context in (1024, 4096) for rows in (1, 8, 32)),
    Case(512, 8, 16, 16, chain=False),
    Case(0, 256, 32, 4, chain=True),
    Case(30, 4, 4, 4, chain=False),
]


def make_layout(case: Case) -> tuple[AttentionLayout, Tensor]:
    """The layout on shuffled pages, and the mask for dense attention [num_rows, num_keys]."""
    choose = random.Random(0)
    masks: list[int] = []
    for row in range(case.num_rows):
        parent = row - 1 if case.chain else choose.randrange(max(0, row - 4), max(1, row))
        masks.append((masks[parent] if row else 0) | 1 << row)
    num_words = -(-case.num_rows // 64)
    words = [[(mask >> 64 * word) & (1 << 64) - 1 for word in range(num_words)] for mask in masks]
    signed = [[word - (1 << 64) if word >> 63 else word for word in row] for row in words]
    num_keys = case.context + case.num_rows
    blocks = list(range(-(-num_keys // BLOCK_SIZE)))
    choose.shuffle(blocks)
    layout = AttentionLayout(
        row_offsets=torch.tensor([0, case.num_rows], dtype=torch.int32),
        context_lens=torch.tensor([case.context], dtype=torch.int32),
        block_tables=torch.tensor([blocks], dtype=torch.int32),
        ancestors=torch.tensor(signed),
    )
    seen = torch.ones(case.num_rows, num_keys, dtype=torch.bool)
    for row, mask in enumerate(masks):
        for key in range(case.num_rows):
            seen[row, case.context + key] = bool(mask >> key & 1)
    return layout, seen


def run_case(case: Case, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    layout, seen = make_layout(case)
    num_blocks, num_keys = layout.block_tables.shape[1], seen.shape[1]
    shape = (num_blocks, BLOCK_SIZE, case.num_kv_heads, HEAD_DIM)
    keys, values = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    query = torch.randn(case.num_rows, case.num_heads, HEAD_DIM).to(dtype)
    order = layout.block_tables[0].long()
    dense_keys = keys[order].flatten(0, 1)[:num_keys].transpose(0, 1)[None].contiguous()
    dense_values = values[order].flatten(0, 1)[:num_keys].transpose(0, 1)[None].contiguous()
    dense = partial(
        functional.scaled_dot_product_attention,
        query.transpose(0, 1)[None].contiguous(),
        dense_keys,
        dense_values,
        attn_mask=seen,
        enable_gqa=case.num_heads != case.num_kv_heads,
    )
    ours = partial(tree_attention, query, keys, values, layout, scale=HEAD_DIM**-0.5)
    candidates: dict[str, Callable[[], object]] = {
        "ours": ours,
        "sdpa": dense,
        "memory": lambda: (keys.sum(), values.sum()),
    }
    if case.num_rows * num_keys <= REFERENCE_LIMIT and "native" in available_backends():
        candidates["reference"] = partial(ours, backend="reference")
    name = str(dtype).removeprefix("torch.")
    seconds = interleaved(candidates, rounds)
    print_row(f"{name} {case.label}", seconds, "ours")
    return {"dtype": name, "case": case.label} | summary_of(seconds, "ours")


def main() -> None:
    arguments = parse_arguments("tree attention", add_json_option)
    dtypes = (torch.bfloat16, torch.float32)
    lines = [run_case(case, dtype, arguments.rounds) for dtype in dtypes for case in CASES]
    save(arguments, lines)


if __name__ == "__main__":
    main()
