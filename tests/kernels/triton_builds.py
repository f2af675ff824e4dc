"""Builds of the attention kernels for sm_90, made in a process that does not interpret Triton."""

import re
from collections.abc import Callable
from typing import Any

import torch

from specinfer_kernels.triton import attention, attention_device
from tests.kit.triton_compile import POINTERS, compile_kernel


def attention_builds() -> dict[str, Any]:
    """What the test asks of both kernels, by dtype of query and caches."""
    return {
        f"{query} {cache} {name}": _build(query, cache, name)
        for query, cache in (("bfloat16", "bfloat16"), ("float16", "float8_e4m3fn"))
        for name in ("shared_kernel", "finish_kernel")
    }


def _build(query: str, cache: str, name: str) -> dict[str, Any]:
    dtype = getattr(torch, query)
    inputs = attention_device.Inputs(
        torch.empty(1, 8, 64, dtype=dtype), torch.empty(1, 16, 2, 64), *[None] * 4
    )
    shape = attention.compiled_shape(inputs, attention.tile_sizes(dtype, 64))
    out, cached, whole = POINTERS[query], POINTERS[cache], POINTERS["int32"]
    signature: dict[str, Any] = {
        "inputs": attention_device.Inputs(out, cached, cached, whole, whole, whole),
        "plan": attention_device.Plan(whole, whole, whole, whole),
        "states": attention_device.States(*[POINTERS["float32"]] * 3),
    }
    aligned = [(0, index) for index in range(6)] + [(2, index) for index in range(3)]
    if name == "finish_kernel":
        signature["output"] = out
    signature["numbers"] = attention_device.Numbers(*["i32"] * 7, *["fp32"] * 3)
    aligned += [(len(signature) - 1, index) for index in (2, 3)]
    signature["SHAPE"] = "constexpr"
    kernel: Callable[..., Any] = getattr(attention_device, name)
    built = compile_kernel(
        kernel, signature, {"SHAPE": shape}, aligned, attention.launch_options(shape)
    )
    ptx = built.asm["ptx"]
    products = re.findall(r"(wgmma\.mma_async\S*|mma\.sync\S*)", ptx)
    return {
        "target": re.findall(r"\.target (\w+)", ptx)[0],
        "products": sorted(set(products)),
        "fused": len(re.findall(r"\bfma\.rn", ptx)),
        "shared_bytes": built.metadata.shared,
        "warps": built.metadata.num_warps,
    }
