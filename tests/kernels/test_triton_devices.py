"""Every Triton kernel is launched on the GPU of its tensors, whichever is the current one.

No machine of the tests has two of them, so what is checked is the launchers' text.
"""

import ast
from pathlib import Path

import specinfer_kernels.triton

LAUNCHERS = [
    path
    for path in Path(specinfer_kernels.triton.__file__).parent.glob("*.py")
    if not path.stem.endswith("_device")
]


def unguarded_kernels(source: str) -> tuple[list[str], int]:
    """Kernels named outside of `with device_of(...)`, and how many are named in all."""
    tree = ast.parse(source)
    guarded = {
        inner
        for block in ast.walk(tree)
        if isinstance(block, ast.With)
        and any("device_of(" in ast.unparse(item.context_expr) for item in block.items)
        for inner in ast.walk(block)
    }
    named = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.endswith("_kernel")
    ]
    return [node.attr for node in named if node not in guarded], len(named)


def test_every_launch_is_on_the_device_of_its_tensors() -> None:
    found = {path.name: unguarded_kernels(path.read_text()) for path in LAUNCHERS}
    assert {name: kernels for name, (kernels, _) in found.items() if kernels} == {}
    assert sum(count for _, count in found.values()) >= 11


def test_negative_control_a_launch_beside_the_guard() -> None:
    source = "with device_of(rows):\n    device.a_kernel[1](rows)\ndevice.b_kernel[1](rows)\n"
    assert unguarded_kernels(source) == (["b_kernel"], 2)
