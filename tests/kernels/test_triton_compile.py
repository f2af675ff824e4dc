"""The Triton kernels compiled for an H100 and H200 (sm_90), which needs no GPU."""

import ast
import inspect
import struct
from typing import Any

import pytest

from specinfer_kernels import reference
from tests.kit.triton_compile import SHARED_BYTES, compile_apart

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def builds() -> dict[str, Any]:
    return compile_apart("tests.kernels.triton_builds:all_builds")


def test_all_compile_for_the_gpu_and_fit_it(builds: dict[str, Any]) -> None:
    for family in builds.values():
        for name, build in family.items():
            assert build["target"].startswith("sm_90"), name
            assert build["shared_bytes"] <= SHARED_BYTES, name


def test_attention_uses_tensor_cores_and_both_kernels_the_same(builds: dict[str, Any]) -> None:
    """A row begun by one kernel and ended by the other keeps its bits only if they compute alike:
    the same tensor-core instruction, and no fused multiply-add that one of them could lack."""
    attention = builds["attention"]
    found = [name.partition(" ")[2] for name in attention if name.startswith("shared_kernel")]
    sizes = ["bfloat16 64", "bfloat16 128", "bfloat16 128 serial, cut", "bfloat16 256"]
    assert sorted(found) == sorted([*sizes, "float8_e4m3fn 64", "float32 256"])
    for build in found:
        shared, finish = attention[f"shared_kernel {build}"], attention[f"finish_kernel {build}"]
        assert finish["products"] == shared["products"], build
        assert finish["warps"] == shared["warps"], build
        if build.startswith("float32"):
            assert shared["products"] == [], build  # no tensor core, so no TF32
            continue
        # One of the scores and one of the values, where a tile has not as many keys as a head.
        assert len(shared["products"]) == (1 if build.endswith(" 64") else 2), build
        assert all("mma" in product and "f32" in product for product in shared["products"]), build
        assert finish["fused"] == finish["unrounded"] == 0, build
        assert shared["fused"] == shared["unrounded"] == 0, build


def test_few_and_many_rows_are_multiplied_by_one_instruction(builds: dict[str, Any]) -> None:
    """What makes a row's bits its own. The control: tiles of 32 rows take another instruction."""
    linear = builds["linear"]
    instruction = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"
    for name in ("bfloat16 1", "bfloat16 129", "int8 1", "int8 129", "bfloat16 unaligned"):
        build = linear[f"linear_kernel {name}"]
        assert build["products"] == [instruction], name
        # One block of inputs is four of them for each 64 outputs of a group of four warps.
        assert build["num_products"] == build["warps"], name
        assert build["fused"] == build["unrounded"] == 0, name
    assert linear["linear_kernel narrow"]["products"] not in ([], [instruction])


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "float32"])
def test_nothing_is_compiled_for_a_number_of_rows(builds: dict[str, Any], kind: str) -> None:
    linear = builds["linear"]
    for kernel in ("linear_kernel", "fold_kernel"):
        assert linear[f"{kernel} {kind} 1"]["hash"] == linear[f"{kernel} {kind} 16"]["hash"]


def test_float32_is_multiplied_in_full_precision(builds: dict[str, Any]) -> None:
    few, many = (builds["linear"][f"linear_kernel float32 {count}"] for count in (1, 129))
    assert few["products"] == many["products"] == []  # no tensor core, so no TF32
    assert few["fused"] == many["fused"] > 0


def test_noise_is_made_step_by_step(builds: dict[str, Any]) -> None:
    """Each product and sum rounded by itself, constants in full. The control: fusion is seen."""
    draws = builds["draws"]
    assert draws["noise_kernel"]["fused"] == draws["noise_kernel"]["unrounded"] == 0
    assert draws["noise_kernel with fused steps"]["fused"] > 0
    constants = double_constants()
    assert len(constants) > 8
    for name in ("noise_kernel", "sample_kernel"):
        assert constants <= set(draws[name]["doubles"]), name
        assert {kind for kind in draws[name]["divisions"] if ".rn." not in kind} == set(), name
    assert draws["sample_kernel"]["unrounded"] == 0
    assert draws["walk_kernel"]["fused"] == 0


def double_constants() -> set[str]:
    """As PTX writes them, the constants of the noise's logarithm that float32 would round."""
    tree = ast.parse(inspect.getsource(reference.exact_log))
    nodes = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    values = [value for value in nodes if isinstance(value, float)]
    values = [value for value in values if struct.unpack("f", struct.pack("f", value))[0] != value]
    return {"0d" + struct.pack(">d", value).hex().upper() for value in values}


def test_rows_are_rounded_where_the_reference_rounds(builds: dict[str, Any]) -> None:
    for name, build in builds["rows"].items():
        assert build["fused"] == build["unrounded"] == 0, name


def test_float8_is_rounded_to_nearest_by_the_hardware(builds: dict[str, Any]) -> None:
    rotations = {name for name in builds["rows"] if name.startswith("rotate_kernel")}
    assert len(rotations) == 3
    for name in rotations:
        kinds = ["cvt.rn.satfinite.e4m3x2.f32"] if name.endswith("float8_e4m3fn") else []
        assert builds["rows"][name]["conversions"] == kinds, name


def test_moves_read_all_before_they_write(builds: dict[str, Any]) -> None:
    assert builds["rows"]["move_kernel"]["reads_first"]
