"""The Triton kernels compiled for an H100 and H200 (sm_90), which needs no GPU."""

import pytest

from tests.kit.triton_compile import SHARED_BYTES, compile_apart

pytest.importorskip("triton")


def test_attention_uses_tensor_cores_and_both_kernels_the_same() -> None:
    """A row begun by one kernel and ended by the other keeps its bits only if they compute alike:
    the same tensor-core instruction, and no fused multiply-add that one of them could lack."""
    builds = compile_apart("tests.kernels.triton_builds:attention_builds")
    assert len(builds) == 4
    for name, build in builds.items():
        assert build["target"].startswith("sm_90")
        assert build["products"], name
        assert all("mma" in product and "f32" in product for product in build["products"])
        assert build["products"] == builds[name.replace("finish", "shared")]["products"]
        assert build["fused"] == 0, name
        assert build["shared_bytes"] <= SHARED_BYTES
        assert build["warps"] == builds[name.replace("finish", "shared")]["warps"]
