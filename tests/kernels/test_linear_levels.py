"""The product at each processor level: right, row-invariant, and of one arithmetic.

Every level that this processor can run is built as for an image, and held to the same promises. A
sum is one chain of fused multiply-adds whatever the registers' width, so where bfloat16 is not
multiplied in pairs or by a matrix unit two levels give the same bits.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specinfer_kernels import PackedLinear, native, pack_linear, prebuilt
from specinfer_kernels.prebuilt import LEVELS, build_all, processor_features
from specinfer_kernels.reference_linear import int8_linear, linear, quantize_rows
from tests.kernels.cases import same_bits

HERE = [
    level
    for levels in LEVELS.values()
    for level, needed in levels.items()
    if needed and needed <= processor_features() and level.startswith("x86")
]
pytestmark = pytest.mark.skipif(not HERE, reason="no level of x86 fits this processor")
DTYPES = (torch.float32, torch.bfloat16)
# Odd widths, one output more than a panel, large enough for threads and for several blocks, and
# inputs that a matrix unit takes.
THREADS = 3
SHAPES = [(1, 1), (7, 33), (130, 64), (705, 250), (2050, 160), (1056, 160)]
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14, 15, 16, 24, 25, 28, 29, 64, 257)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each level, with its library alone."""
    folders = {}
    if native.native_failure():
        pytest.skip("no compiler here, or the native kernels are turned off")
    for path in build_all(tmp_path_factory.mktemp("all")):
        level = next((level for level in HERE if level in path.name), None)
        if level:
            folders[level] = tmp_path_factory.mktemp(level)
            path.rename(folders[level] / path.name)
    return folders


@contextmanager
def using(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(prebuilt, "PREBUILT_FOLDER", folder)
        native._load.cache_clear()
        try:
            assert str(folder) in native.native_library()._name
            yield
        finally:
            native._load.cache_clear()


def make(
    shape: tuple[int, int], dtype: torch.dtype, int8: bool
) -> tuple[Tensor, Tensor, Tensor, PackedLinear]:
    """weight, bias, rows and the layer."""
    in_features, out_features = shape
    generator = torch.Generator().manual_seed(in_features)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    rows = torch.randn(max(COUNTS), in_features, generator=generator).to(dtype)
    return weight, bias, rows, pack_linear(weight, bias, layout="native", int8=int8)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", HERE)
def test_each_level_is_right_and_keeps_a_rows_bits(
    level: str,
    dtype: torch.dtype,
    int8: bool,
    libraries: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for shape in SHAPES:
        with using(libraries[level], monkeypatch):
            weight, bias, rows, layer = make(shape, dtype, int8)
            whole = layer(rows)
            torch.set_num_threads(THREADS)  # as before from the next test on
            for count in COUNTS:
                # Leaves memory behind that would show if the half of an odd word were not cleared.
                layer(torch.full_like(rows[:count], math.nan))
                assert same_bits(layer(rows[:count]), whole[:count]), (shape, count)
                assert same_bits(layer(rows[-count:]), whole[-count:]), (shape, count)
            torch.set_num_threads(1)
        expected = linear(rows, weight, bias)
        if int8:
            expected = int8_linear(rows, *quantize_rows(weight), bias)
        size = shape[0] ** 0.5
        unit = 2**-8 if dtype == torch.bfloat16 else 5e-6
        assert ((whole.double() - expected).abs() <= unit * (expected.abs() + size)).all(), shape


@pytest.mark.skipif(len(HERE) < 2, reason="one level fits this processor")
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_levels_have_the_same_bits(
    dtype: torch.dtype,
    int8: bool,
    libraries: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype == torch.bfloat16 and "avx512_bf16" in processor_features():
        pytest.skip("the higher level has products of bfloat16 here")
    for shape in SHAPES:
        outputs = []
        for level in HERE:
            with using(libraries[level], monkeypatch):
                _, _, rows, layer = make(shape, dtype, int8)
                outputs.append(layer(rows))
        assert all(same_bits(outputs[0], other) for other in outputs[1:]), shape
