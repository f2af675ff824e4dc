"""Compiling Triton kernels for sm_90 in tests, on a machine with no GPU. Knows no kernel.

A process that interprets Triton compiles nothing, so `compile_apart` calls a function of a test
module in a process of its own. There `compile_only` has each launch compile its kernel for its own
arguments, tensors of a CPU among them, and run nothing. Triton keeps what it has compiled in its
cache folder (TRITON_CACHE_DIR), so a second run takes the time of its imports.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
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


def compile_only() -> list[tuple[str, Any]]:
    """From now on, in this process, launches compile for sm_90 and run nothing.

    Returns a list that grows by the name and the compiled kernel, with `asm["ptx"]`, of each.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoDevice:
        """What Triton asks a driver for when it compiles."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _device: int) -> int:
            return 0

    launches: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        built = run(kernel, *args, grid=grid, warmup=True, **options)
        launches.append((kernel.fn.__name__, built))
        return built

    driver.set_active(NoDevice())
    JITFunction.run = compile_launch
    return launches
