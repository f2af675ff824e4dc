"""Builds of the Triton kernels for sm_90, made in a process that does not interpret Triton.

The launchers are called as the ops call them; each build is what the tests ask of its PTX. Knows no
expectation.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specinfer_kernels import AttentionLayout, Laws
from specinfer_kernels.reference import FLOAT8
from specinfer_kernels.triton import (
    attention,
    decoder_rows,
    linear,
    sampling,
    sampling_device,
    walk,
)
from tests.kit.triton_compile import compile_only

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
Build = dict[str, Any]


def all_builds() -> dict[str, dict[str, Build]]:
    """What the tests ask, by family and build."""
    launches = compile_only()
    families = {
        "attention": _attention_builds,
        "linear": _linear_builds,
        "draws": _draw_builds,
        "rows": _row_builds,
    }
    return {family: dict(builds(launches)) for family, builds in families.items()}


def _take(launches: list[tuple[str, Any]], label: str) -> Iterator[tuple[str, Build]]:
    """The builds since the last call, named by kernel and label."""
    for name, built in launches:
        yield f"{name} {label}".strip(), _facts(built)
    launches.clear()


def _facts(built: Any) -> Build:
    ptx = built.asm["ptx"]
    products = re.findall(r"wgmma\.mma_async\S*|mma\.sync\S*", ptx)
    loads, stores, barriers = (
        [match.start() for match in re.finditer(word, ptx)]
        for word in (r"ld\.global", r"st\.global", r"bar\.sync")
    )
    return {
        "hash": built.hash,
        "target": re.findall(r"\.target (\w+)", ptx)[0],
        "products": sorted(set(products)),
        "num_products": len(products),
        "fused": len(re.findall(r"\bfma\.rn", ptx)),
        # Without a rounding mode the assembler may fuse a product and a sum.
        "unrounded": len(re.findall(r"\b(?:mul|add|sub)\.f(?:32|64)\b", ptx)),
        "divisions": sorted(set(re.findall(r"\bdiv\.\S*", ptx))),
        "doubles": sorted(set(re.findall(r"\b0d[0-9A-F]{16}\b", ptx))),
        "conversions": sorted(set(re.findall(r"\bcvt\.\S*e4m3\S*", ptx))),
        "reads_first": any(max(loads, default=0) < at < min(stores) for at in barriers),
        "shared_bytes": built.metadata.shared,
        "warps": built.metadata.num_warps,
    }


def _attention_builds(launches: list[tuple[str, Any]]) -> Iterator[tuple[str, Build]]:
    layout = AttentionLayout(
        torch.tensor([0, 5], dtype=torch.int32),
        torch.tensor([3], dtype=torch.int32),
        torch.zeros(1, 4, dtype=torch.int32),
        torch.ones(5, 1, dtype=torch.int64),
    )
    tables = (layout.row_offsets, layout.context_lens, layout.block_tables)
    plan = attention.plan_attention(layout.row_offsets, layout.context_lens, layout.ancestors)
    yield from _take(launches, "")
    plain: dict[str, Any] = {"sliding_window": None, "softcap": None}
    cut = {"sliding_window": 9, "softcap": 5.0}
    for dtype, kind, size, rest in (
        (BFLOAT16, BFLOAT16, 64, plain),
        (FLOAT16, FLOAT8, 64, plain),
        (BFLOAT16, BFLOAT16, 128, plain),
        (BFLOAT16, BFLOAT16, 128, {**cut, "serial": True}),
        (BFLOAT16, BFLOAT16, 256, plain),
        (FLOAT32, FLOAT32, 256, plain),
    ):
        query, cache = torch.empty(5, 8, size, dtype=dtype), torch.empty(4, 16, 2, size, dtype=kind)
        attention.tree_attention(query, cache, cache, *tables, plan, scale=0.1, **rest)
        label = f"{str(kind).removeprefix('torch.')} {size}"
        yield from _take(launches, label if rest is plain else f"{label} serial, cut")


def _linear_builds(launches: list[tuple[str, Any]]) -> Iterator[tuple[str, Build]]:
    def multiply(label: str, layer: linear.TritonWeight, rows: Tensor) -> Iterator[Any]:
        linear.multiply_triton(layer, rows)
        yield from _take(launches, label)

    plain, wide = (_layer(dtype) for dtype in (BFLOAT16, FLOAT32))
    quantised = _layer(BFLOAT16, torch.int8)
    for num_rows in (1, 16, 129):
        rows = torch.empty(num_rows, 4096, dtype=BFLOAT16)
        yield from multiply(f"bfloat16 {num_rows}", plain, rows)
        yield from multiply(f"int8 {num_rows}", quantised, rows)
        yield from multiply(f"float32 {num_rows}", wide, rows.float())
    anywhere = torch.empty(4097, dtype=BFLOAT16)[1:].view(1, 4096)
    yield from multiply("bfloat16 unaligned", plain, anywhere)
    narrow = _layer(BFLOAT16, sizes=linear.TileSizes(block_rows=32))
    yield from multiply("narrow", narrow, anywhere)


def _layer(
    dtype: torch.dtype, stored: torch.dtype | None = None, **sizes: Any
) -> linear.TritonWeight:
    """A layer of 4,096 inputs and outputs, whose inputs are in splits."""
    weight = torch.empty(4096, 4096, dtype=stored or dtype)
    scale = None if stored is None else torch.empty(4096)
    return linear.pack_triton(weight, torch.empty(4096, dtype=dtype), dtype, scale, **sizes)


@triton.jit  # type: ignore[untyped-decorator]
def noise_kernel(states, noise, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The noise of BLOCK tokens, as `sample_kernel` makes it."""
    lanes = tl.arange(0, BLOCK)
    state = tl.load(states).to(tl.uint64)
    tl.store(noise + lanes, sampling_device.gumbel(state, lanes.to(tl.int64)))


def _draw_builds(launches: list[tuple[str, Any]]) -> Iterator[tuple[str, Build]]:
    whole, noise = torch.zeros(3, dtype=torch.int64), torch.empty(128, dtype=torch.float64)
    for fused in (False, True):
        noise_kernel[(1,)](whole, noise, BLOCK=128, enable_fp_fusion=fused)
        yield from _take(launches, "with fused steps" if fused else "")
    law = torch.ones(3)
    laws = Laws(law, law.int(), law.double(), law.double())
    sampling.sample_law(torch.empty(3, 1000), laws, whole, whole)
    walk.walk_trees(whole, whole, whole.int(), torch.tensor([0, 3], dtype=torch.int32), 7)
    yield from _take(launches, "")


def _row_builds(launches: list[tuple[str, Any]]) -> Iterator[tuple[str, Build]]:
    whole = torch.zeros(3, dtype=torch.int64)
    for dtype, cache in ((BFLOAT16, BFLOAT16), (FLOAT32, FLOAT32), (BFLOAT16, FLOAT8)):
        rows, weight = torch.empty(3, 4096, dtype=dtype), torch.empty(4096, dtype=dtype)
        decoder_rows.rms_norm(rows, rows, weight, 1e-5)
        decoder_rows.silu_multiply(rows)
        table, pool = torch.empty(9, 128, dtype=dtype), torch.empty(4, 16, 8, 128, dtype=cache)
        heads = table[0]
        decoder_rows.rotate_and_write_kv(
            rows, whole, whole, table, table, pool, pool, heads, heads, 1e-6
        )
        yield from _take(launches, f"{dtype} into {cache}")
    decoder_rows.move_slots(torch.empty(1, 2, 4, 16, 8, 128, dtype=BFLOAT16), whole, whole)
    yield from _take(launches, "")
