"""Compiling Triton kernels for sm_90 in tests, on a machine with no GPU. Knows no kernel.

A process that interprets Triton compiles nothing, so `compile_apart` calls a function of a test
module in a process of its own. Triton keeps what it has compiled in its cache folder
(TRITON_CACHE_DIR), so a second run takes the time of its imports.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
POINTERS = {
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "float32": "*fp32",
    "float64": "*fp64",
    "float8_e4m3fn": "*fp8e4nv",
    "int8": "*i8",
    "int32": "*i32",
    "int64": "*i64",
    "uint8": "*u8",
}
# Shared memory that one block of an H100 or H200 may use.
SHARED_BYTES = 227 << 10


def compile_apart(function: str) -> dict[str, Any]:
    """What `module:name`, a function without arguments that returns a JSON value, returns."""
    module, name = function.split(":")
    code = f"import json; from {module} import {name} as f; print('RESULT ' + json.dumps(f()))"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    last = done.stdout.splitlines()[-1]
    result: dict[str, Any] = json.loads(last.removeprefix("RESULT "))
    return result


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, Any],
    constants: Mapping[str, Any],
    aligned: Iterable[tuple[int, ...]],
    options: Mapping[str, Any],
) -> Any:
    """Triton's compiled kernel, with `asm["ptx"]`.

    signature: type of each argument in order, a (named) tuple of types for a tuple. constants:
    values of those of type "constexpr". aligned: paths of arguments that 16 divides.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(signature)
    source = ASTSource(
        fn=kernel,
        signature=dict(signature),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options))
