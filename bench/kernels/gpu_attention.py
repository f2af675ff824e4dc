"""Tree attention on a GPU against SDPA with a dense mask, FlexAttention and FlashInfer.

    python bench/kernels/gpu_attention.py [--rounds N] [--output FILE] [--check]

64 rows as plain decoding of 64 sequences, as eight trees of eight nodes and as one tree. The floor
reads every key and value once and does the products of the keys that rows see. Goal on an H200: at
most 1.25 floors from 4,096 tokens of context up. SDPA and FlexAttention get keys gathered and masks
made beforehand, and pay for neither pages nor trees; FlashInfer gets its plan made.
`float8` is ours over keys and values of one byte, half the bytes that the floor reads.
"""

import importlib
import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from gpu_timing import Bench, Work, parse
from torch import Tensor
from torch.nn import functional

from specinfer_kernels import AttentionLayout, tree_attention

HEAD_DIM, BLOCK_SIZE = 128, 16
# Dense candidates hold a second copy of the keys, and masked SDPA may hold several.
DENSE_BYTES = 8 << 30
FLASHINFER_WORKSPACE_BYTES = 256 << 20


@dataclass(frozen=True)
class Case:
    """So many trees of one size, each after its own context."""

    context: int
    num_trees: int
    tree_size: int
    num_heads: int = 32
    num_kv_heads: int = 8
    dtype: torch.dtype = torch.bfloat16

    @property
    def num_rows(self) -> int:
        """Rows of the pass."""
        return self.num_trees * self.tree_size

    @property
    def num_keys(self) -> int:
        """Keys of each sequence, those of this pass included."""
        return self.context + self.tree_size

    @property
    def num_blocks(self) -> int:
        """Blocks of each sequence."""
        return -(-self.num_keys // BLOCK_SIZE)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values."""
        per_key = 2 * self.num_kv_heads * HEAD_DIM * self.dtype.itemsize
        return self.num_trees * self.num_keys * per_key

    @property
    def label(self) -> str:
        """How the row is called."""
        heads = f"{self.num_heads}/{self.num_kv_heads} heads"
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.num_trees} x {self.tree_size} after {self.context}, {heads}, {name}"

    @cached_property
    def parents(self) -> list[int]:
        """The same random tree for every sequence."""
        choose = random.Random(0)
        return [-1, *(choose.randrange(max(0, row - 4), row) for row in range(1, self.tree_size))]

    @cached_property
    def masks(self) -> list[int]:
        """Ancestors of each node as a bit set."""
        masks: list[int] = []
        for row, parent in enumerate(self.parents):
            masks.append((masks[parent] if row else 0) | 1 << row)
        return masks

    def work(self) -> Work:
        """Keys and values, queries and results once; two products over the keys seen."""
        rows_bytes = 2 * self.num_rows * self.num_heads * HEAD_DIM * self.dtype.itemsize
        seen = sum(self.context + mask.bit_count() for mask in self.masks) * self.num_trees
        operations = 4 * seen * self.num_heads * HEAD_DIM
        return Work(self.kv_bytes + rows_bytes, operations, self.dtype)


CASES = (
    *(Case(context, 64, 1) for context in (1024, 4096, 16384, 32768)),
    *(Case(context, 8, 8) for context in (1024, 4096, 16384, 32768)),
    *(Case(context, 1, 64) for context in (1024, 4096, 32768)),
    *(Case(4096, 8, 8, 32, kv_heads) for kv_heads in (1, 4, 16, 32)),
    Case(4096, 8, 8, dtype=torch.float16),
    Case(4096, 8, 8, dtype=torch.float32),
    Case(0, 1, 256),
)
SMALL_CASES = (Case(20, 2, 1, 4, 2, torch.float32), Case(5, 2, 6, 4, 2, torch.float32))


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case: query [num_rows, num_heads, HEAD_DIM], paged caches and their layout."""

    case: Case
    query: Tensor
    keys: Tensor
    values: Tensor
    layout: AttentionLayout

    @cached_property
    def seen(self) -> Tensor:
        """Which keys each node sees, bool [tree_size, num_keys]."""
        seen = torch.zeros(self.case.tree_size, self.case.num_keys, dtype=torch.bool)
        seen[:, : self.case.context] = True
        for row, mask in enumerate(self.case.masks):
            for node in range(row + 1):
                seen[row, self.case.context + node] = bool(mask >> node & 1)
        return seen.to(self.query.device)

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values [num_trees, heads, rows or keys, HEAD_DIM] without pages."""
        case = self.case
        order = self.layout.block_tables.long()
        gathered = [
            cache[order].flatten(1, 2)[:, : case.num_keys].transpose(1, 2).contiguous()
            for cache in (self.keys, self.values)
        ]
        query = self.query.view(case.num_trees, case.tree_size, case.num_heads, HEAD_DIM)
        return query.transpose(1, 2).contiguous(), gathered[0], gathered[1]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random values on shuffled pages."""
    num_blocks = case.num_trees * case.num_blocks
    shape = (num_blocks, BLOCK_SIZE, case.num_kv_heads, HEAD_DIM)
    tables = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).int()
    num_words = -(-case.tree_size // 64)
    raw = b"".join(mask.to_bytes(num_words * 8, "little") for mask in case.masks)
    words = torch.frombuffer(bytearray(raw), dtype=torch.int64).view(-1, num_words)
    layout = AttentionLayout(
        row_offsets=(torch.arange(case.num_trees + 1) * case.tree_size).int().to(device),
        context_lens=torch.full((case.num_trees,), case.context).int().to(device),
        block_tables=tables.view(case.num_trees, case.num_blocks).to(device),
        ancestors=words.repeat(case.num_trees, 1).to(device),
    )
    return Inputs(
        case,
        torch.randn(case.num_rows, case.num_heads, HEAD_DIM, device=device).to(case.dtype),
        torch.randn(shape, device=device, dtype=case.dtype),
        torch.randn(shape, device=device, dtype=case.dtype),
        layout,
    )


def sdpa(inputs: Inputs) -> Callable[[], object]:
    """torch's fused attention with a dense mask."""
    query, keys, values = inputs.dense
    grouped = inputs.case.num_heads != inputs.case.num_kv_heads
    return partial(
        functional.scaled_dot_product_attention,
        query,
        keys,
        values,
        attn_mask=inputs.seen,
        enable_gqa=grouped,
    )


def flex(inputs: Inputs) -> Callable[[], object]:
    """FlexAttention, compiled, its block mask made."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, keys, values = inputs.dense
    case, seen = inputs.case, inputs.seen

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return seen[row, key]

    blocks = create_block_mask(
        sees, None, None, case.tree_size, case.num_keys, device=str(query.device)
    )
    grouped = case.num_heads != case.num_kv_heads
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, query, keys, values, block_mask=blocks, enable_gqa=grouped)


def flash_infer(inputs: Inputs) -> Callable[[], object]:
    """FlashInfer's paged prefill with a custom mask, planned."""
    flashinfer: Any = importlib.import_module("flashinfer")
    case, device = inputs.case, inputs.query.device
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    last = case.num_keys - (case.num_blocks - 1) * BLOCK_SIZE
    wrapper.plan(
        inputs.layout.row_offsets,
        (torch.arange(case.num_trees + 1) * case.num_blocks).int().to(device),
        inputs.layout.block_tables.flatten(),
        torch.full((case.num_trees,), last, dtype=torch.int32, device=device),
        case.num_heads,
        case.num_kv_heads,
        HEAD_DIM,
        BLOCK_SIZE,
        custom_mask=inputs.seen.flatten().repeat(case.num_trees),
        q_data_type=case.dtype,
        kv_data_type=case.dtype,
    )
    return partial(wrapper.run, inputs.query, (inputs.keys, inputs.values))


def run_case(bench: Bench, case: Case) -> None:
    """One row of the table."""
    inputs = make_inputs(case, bench.device)
    candidates: dict[str, Callable[[], object]] = {
        name: partial(
            tree_attention,
            inputs.query,
            inputs.keys.to(kind),
            inputs.values.to(kind),
            inputs.layout,
            scale=HEAD_DIM**-0.5,
        )
        for name, kind in (("ours", case.dtype), ("float8", torch.float8_e4m3fn))
    }
    absent: dict[str, str] = {}
    others = {"sdpa": sdpa, "flex": flex, "flashinfer": flash_infer}
    for name, make in others.items():
        reason = why_absent(name, case, bench)
        if reason is not None:
            absent[name] = reason
            continue
        try:
            candidates[name] = make(inputs)
        # Compilers and other people's packages fail in their own ways; the row says how.
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
    bench.measure(case.label, case.work(), candidates, absent)


def why_absent(name: str, case: Case, bench: Bench) -> str | None:
    """Why a candidate has no place in a row, or None when it has."""
    if name == "flashinfer":
        installed = importlib.util.find_spec("flashinfer") is not None
        if not installed or bench.device.type != "cuda":
            return "not installed" if not installed else "needs CUDA"
        return "no float32" if case.dtype == torch.float32 else None
    if case.kv_bytes > DENSE_BYTES:
        return "a dense copy would be too large"
    if name == "flex" and bench.device.type != "cuda":
        return "compiled on CUDA only"
    return None


def main() -> None:
    """All cases."""
    bench = Bench("attention", parse("tree attention on a GPU"))
    for case in SMALL_CASES if bench.check else CASES:
        run_case(bench, case)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    bench.finish()


if __name__ == "__main__":
    main()
