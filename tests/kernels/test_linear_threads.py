"""Products by several threads: a row has the bits that one thread gives it.

Large enough that threads share the work, with rows that each thread lays out for itself and rows
that all lay out together, widths that fill no word, and both kinds of weights. Not plain torch: its
library may share sums out otherwise among more threads, and does so on some processors.
"""

import pytest
import torch

from specinfer_kernels import pack_linear
from specinfer_kernels.packed_linear import Layout, layouts
from tests.kernels.cases import same_bits

CASES: list[tuple[torch.dtype, bool, Layout]] = [
    (dtype, int8, layout)
    for dtype in (torch.float32, torch.bfloat16)
    for int8 in (False, True)
    for layout in layouts(torch.zeros(1, 1, dtype=dtype), int8=int8)
    if layout != "plain"
]
SHAPES = [(704, 256, 512), (1031, 330, 512)]
# So wide that three threads' own layouts of 14 rows would take too much memory, with an odd number
# of inputs and with one that a matrix unit takes. oneDNN sums so many inputs in parts, by threads.
WIDE = [(60_001, 96, 15), (60_000, 96, 15)]


@pytest.mark.parametrize(
    ("dtype", "int8", "layout", "shape"),
    [(*case, shape) for case in CASES for shape in SHAPES]
    + [(*case, wide) for wide in WIDE for case in CASES if case[2] == "native"],
)
def test_bits_do_not_depend_on_threads(
    dtype: torch.dtype,
    int8: bool,
    layout: Layout,
    shape: tuple[int, int, int],
) -> None:
    in_features, out_features, num_rows = shape
    generator = torch.Generator().manual_seed(in_features)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    rows = torch.randn(num_rows, in_features, generator=generator).to(dtype)
    layer = pack_linear(weight, layout=layout, int8=int8)
    counts = [count for count in (1, 4, 14, 15, 64, 512) if count <= num_rows]
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append([layer(rows[:count]) for count in counts])
    finally:
        torch.set_num_threads(before)
    for other in outputs[1:]:
        assert all(same_bits(a, b) for a, b in zip(outputs[0], other, strict=True))
