"""The product by a processor's matrix unit: which sums it is, to the bit, and that it serves."""

import subprocess

import pytest
import torch
from torch import Tensor

from specinfer_kernels import pack_linear
from specinfer_kernels.build import find_compiler
from specinfer_kernels.native import native_failure
from specinfer_kernels.native_linear import bfloat16_products
from tests.kernels.cases import same_bits

unit = pytest.mark.skipif(bfloat16_products() != "matrices", reason="no matrix unit serves here")
INPUTS_AT_ONCE = 32


def by_blocks(rows: Tensor, weight: Tensor) -> Tensor:
    """bfloat16 [n, out]: of every 32 inputs the even and the odd ones are summed apart.

    A product of two bfloat16 is exact in float32, so each addition rounds once; none of these sums
    is subnormal, which the unit would make zero.
    """
    total = torch.zeros(rows.shape[0], weight.shape[0])
    for start in range(0, rows.shape[1], INPUTS_AT_ONCE):
        sums = [torch.zeros_like(total), torch.zeros_like(total)]
        for place in range(start, start + INPUTS_AT_ONCE):
            sums[place % 2] += rows[:, place : place + 1].float() * weight[:, place].float()
        total += sums[0] + sums[1]
    return total.bfloat16()


def by_one_chain(rows: Tensor, weight: Tensor) -> Tensor:
    """bfloat16 [n, out]: what pairs, or halves, sum."""
    total = torch.zeros(rows.shape[0], weight.shape[0])
    for place in range(rows.shape[1]):
        total += rows[:, place : place + 1].float() * weight[:, place].float()
    return total.bfloat16()


def make(num_rows: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """Rows and a weight whose products cancel: what is left is how each sum was rounded."""
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(out_features, in_features // 2, generator=generator).bfloat16()
    rows = torch.randn(num_rows, in_features // 2, generator=generator).bfloat16()
    return torch.cat((rows, rows.flip(1)), 1), torch.cat((weight, -weight.flip(1)), 1)


def test_the_unit_serves_where_the_system_gives_it_and_the_compiler_knows_it() -> None:
    if native_failure() or not torch.cpu._init_amx():
        pytest.skip("no native library here, or no matrix unit that the system gives")
    command = [find_compiler(), "-x", "c++", "-fsyntax-only", "-"]
    source = "#if !__has_include(<amxtileintrin.h>)\n#error\n#endif\n"
    if subprocess.run(command, input=source, text=True, capture_output=True).returncode:
        pytest.skip("the compiler does not know the unit")
    assert bfloat16_products() == "matrices"


@unit
@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 31, 32, 33, 48, 65, 100, 257, 300])
@pytest.mark.parametrize(("in_features", "out_features"), [(32, 1), (256, 33), (1056, 160)])
def test_sums_are_those_of_the_unit(num_rows: int, in_features: int, out_features: int) -> None:
    rows, weight = make(num_rows, in_features, out_features)
    assert same_bits(pack_linear(weight, layout="native")(rows), by_blocks(rows, weight))


@unit
def test_negative_control_one_chain_has_other_bits() -> None:
    rows, weight = make(40, 1024, 64)
    served = pack_linear(weight, layout="native")(rows)
    assert not same_bits(by_one_chain(rows, weight), served)
    assert same_bits(by_blocks(rows, weight), served)


@unit
def test_int8_weights_are_multiplied_as_the_same_words() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-127, 128, (70, 512), generator=generator)
    whole[:, 0] = 127  # so that the scale of every output is 1
    weight = whole.bfloat16()
    rows = torch.randn(37, 512, generator=generator).bfloat16()
    wide = pack_linear(weight, layout="native")(rows)
    assert same_bits(pack_linear(weight, layout="native", int8=True)(rows), wide)
