"""Builds of the Triton kernels for sm_90, made in a process that does not interpret Triton.

Each is what the test asks of its PTX, by name. Knows no expectation.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from specinfer_kernels.triton import (
    attention,
    attention_device,
    decoder_rows_device,
    linear,
    linear_device,
    sampling,
    sampling_device,
    walk,
    walk_device,
)
from tests.kit.triton_compile import POINTERS, compile_kernel

FLOAT, WHOLE, LONG, DOUBLE = (POINTERS[kind] for kind in ("float32", "int32", "int64", "float64"))
EXACT = {"enable_fp_fusion": False}


def all_builds() -> dict[str, Any]:
    """What the tests ask, by family and build."""
    return {
        "attention": {
            f"{query} {cache} {name}": _attention(query, cache, name)
            for query, cache in (("bfloat16", "bfloat16"), ("float16", "float8_e4m3fn"))
            for name in ("shared_kernel", "finish_kernel")
        },
        "linear": dict(_linear_builds()),
        "draws": dict(_draw_builds()),
        "rows": dict(_row_builds()),
    }


def _facts(built: Any) -> dict[str, Any]:
    ptx = built.asm["ptx"]
    loads, stores, barriers = (
        [match.start() for match in re.finditer(word, ptx)]
        for word in (r"ld\.global", r"st\.global", r"bar\.sync")
    )
    return {
        "target": re.findall(r"\.target (\w+)", ptx)[0],
        "products": sorted(set(re.findall(r"(wgmma\.mma_async\S*|mma\.sync\S*)", ptx))),
        "num_products": len(re.findall(r"wgmma\.mma_async\S*|mma\.sync\S*", ptx)),
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


def _build(
    kernel: Any,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    options: dict[str, Any],
    odd: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Pointers and integers are taken as multiples of 16, except those that `odd` names."""
    aligned: list[tuple[int, ...]] = []
    for index, (name, kind) in enumerate(arguments.items()):
        if isinstance(kind, tuple):
            aligned += [(index, part) for part, item in enumerate(kind) if item.startswith("*")]
        elif name not in odd and (kind.startswith("*") or kind == "i32"):
            aligned.append((index,))
    signature = arguments | dict.fromkeys(constants, "constexpr")
    return _facts(compile_kernel(kernel, signature, constants, aligned, options))


def _attention(query: str, cache: str, name: str) -> dict[str, Any]:
    dtype = getattr(torch, query)
    inputs = attention_device.Inputs(
        torch.empty(1, 8, 64, dtype=dtype), torch.empty(1, 16, 2, 64), *[None] * 4
    )
    shape = attention.compiled_shape(inputs, attention.tile_sizes(dtype, 64))
    out, cached = POINTERS[query], POINTERS[cache]
    signature: dict[str, Any] = {
        "inputs": attention_device.Inputs(out, cached, cached, WHOLE, WHOLE, WHOLE),
        "plan": attention_device.Plan(WHOLE, WHOLE, WHOLE, WHOLE),
        "states": attention_device.States(FLOAT, FLOAT, FLOAT),
    }
    aligned = [(0, index) for index in range(6)] + [(2, index) for index in range(3)]
    if name == "finish_kernel":
        signature["output"] = out
    signature["numbers"] = attention_device.Numbers(*["i32"] * 7, *["fp32"] * 3)
    aligned += [(len(signature) - 1, index) for index in (2, 3)]
    signature["SHAPE"] = "constexpr"
    kernel: Callable[..., Any] = getattr(attention_device, name)
    options = attention.launch_options(shape)
    return _facts(compile_kernel(kernel, signature, {"SHAPE": shape}, aligned, options))


def _linear_builds() -> Iterator[tuple[str, dict[str, Any]]]:
    narrow = linear.TileSizes(block_rows=32)
    yield "bfloat16 few", _linear("bfloat16", "bfloat16", 1)
    yield "bfloat16 many", _linear("bfloat16", "bfloat16", 4096)
    yield "bfloat16 few unaligned", _linear("bfloat16", "bfloat16", 1, odd=("x",))
    yield "bfloat16 narrow", _linear("bfloat16", "bfloat16", 1, narrow)
    yield "int8 few", _linear("bfloat16", "int8", 1)
    yield "int8 many", _linear("bfloat16", "int8", 4096)
    yield "float32 few", _linear("float32", "float32", 1)
    yield "float32 many", _linear("float32", "float32", 4096)


def _linear(
    kind: str,
    weight_kind: str,
    num_rows: int,
    sizes: linear.TileSizes | None = None,
    odd: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A layer of 4,096 inputs and outputs."""
    weight = torch.empty(4096, 4096, dtype=getattr(torch, weight_kind), device="meta")
    scale = torch.empty(4096, device="meta") if weight_kind == "int8" else None
    packed = linear.pack_triton(weight, None, getattr(torch, kind), scale, sizes=sizes)
    shape = linear.compiled_shape(packed, num_rows)
    pointer, stored = POINTERS[kind], POINTERS[weight_kind]
    arguments = {
        "layer": linear_device.Layer(stored, FLOAT, pointer),
        "x": pointer,
        "sums": FLOAT,
        "output": pointer,
        "num_rows": "i32",
    }
    options = linear.launch_options(shape)
    odd = ("num_rows", *odd)
    return _build(linear_device.linear_kernel, arguments, {"SHAPE": shape}, options, odd)


@triton.jit  # type: ignore[untyped-decorator]
def noise_kernel(states, noise, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The noise of BLOCK tokens, as `sample_kernel` makes it."""
    lanes = tl.arange(0, BLOCK)
    state = tl.load(states).to(tl.uint64)
    tl.store(noise + lanes, sampling_device.gumbel(state, lanes.to(tl.int64)))


def _draw_builds() -> Iterator[tuple[str, dict[str, Any]]]:
    noise = {"states": LONG, "noise": DOUBLE}
    yield "noise", _build(noise_kernel, noise, {"BLOCK": 128}, EXACT)
    fused = {"enable_fp_fusion": True}
    yield "noise with fused steps", _build(noise_kernel, noise, {"BLOCK": 128}, fused)
    arguments = {
        "logits": FLOAT,
        "laws": sampling_device.Laws(FLOAT, WHOLE, DOUBLE, DOUBLE),
        "seeds": LONG,
        "positions": LONG,
        "tokens": LONG,
        "row_stride": "i32",
        "vocab_size": "i32",
    }
    options = {"num_warps": 8, **EXACT}
    yield (
        "sample",
        _build(sampling_device.sample_kernel, arguments, {"BLOCK": sampling.BLOCK}, options),
    )
    names = ("draws", "token_ids", "parents", "row_offsets", "walks")
    trees = dict(zip(names, (LONG, LONG, WHOLE, WHOLE, LONG), strict=True)) | {"max_depth": "i32"}
    options = {"num_warps": 1, **EXACT}
    yield "walk", _build(walk_device.walk_kernel, trees, {"BLOCK": walk.BLOCK}, options)


def _row_builds() -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in ("bfloat16", "float32"):
        rows = POINTERS[kind]
        norm = dict.fromkeys(("values", "update", "weight", "result"), rows)
        norm |= dict.fromkeys(("value_stride", "update_stride", "width"), "i32")
        constants: dict[str, Any] = {"HAS_UPDATE": True, "BLOCK": 4096}
        options = {"num_warps": 8, **EXACT}
        yield (
            f"norm {kind}",
            _build(decoder_rows_device.norm_kernel, norm | {"epsilon": "fp32"}, constants, options),
        )
        gate = {"gate_up": rows, "result": rows, "stride": "i32", "width": "i32"}
        options = {"num_warps": 2, **EXACT}
        yield (
            f"gate {kind}",
            _build(decoder_rows_device.gate_kernel, gate, {"BLOCK": 1024}, options),
        )
        yield f"rotate {kind}", _rotate(rows, rows)
    yield "rotate into float8", _rotate(POINTERS["bfloat16"], POINTERS["float8_e4m3fn"])
    moves = {"pool": POINTERS["bfloat16"], "sources": LONG, "targets": LONG}
    moves |= dict.fromkeys(("num_moves", "num_slots", "width"), "i32")
    constants = {"MOVES": 16, "COLUMNS": 1024}
    yield (
        "move",
        _build(
            decoder_rows_device.move_kernel,
            moves,
            constants,
            {"num_warps": 4, **EXACT},
            odd=("num_moves",),
        ),
    )


def _rotate(rows: str, cache: str) -> dict[str, Any]:
    arguments = {
        "tensors": decoder_rows_device.Rotation(rows, LONG, LONG, rows, rows, cache, cache, rows),
        "query_weight": rows,
        "key_weight": rows,
        "row_stride": "i32",
        **dict.fromkeys(("epsilon", "key_inverse", "value_inverse"), "fp32"),
    }
    # In the kernel's order.
    constants = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128}
    constants |= {"HAS_NORMS": True, "FLOAT8": cache != rows, "HALF": 64}
    options = {"num_warps": 1, **EXACT}
    return _build(decoder_rows_device.rotate_kernel, arguments, constants, options)
