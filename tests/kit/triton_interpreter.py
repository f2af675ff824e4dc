"""Triton on a CPU in tests: when to interpret, and an interpreter that does not take minutes.

Knows no kernel. Triton reads TRITON_INTERPRET when it is imported, so the tests' root conftest
calls `interpret_without_a_gpu` before anything can import it.
"""

import os
from pathlib import Path
from typing import Any

import pytest

CUDA_DEVICE = Path("/dev/nvidiactl")


def interpret_without_a_gpu() -> None:
    """Have Triton interpret in this process, unless there is a GPU or the caller has decided."""
    if not CUDA_DEVICE.exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter prepare a module at its first device call, not at each of them.

    Triton 3.6 to 3.9 patch all of triton.language anew at every call of a device function, which
    takes more than half of a test's time.
    """
    from triton.runtime import interpreter

    prepared: set[str] = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        # The launch of a kernel has prepared the language as user code sees it.
        module = function.fn.__module__
        if module.startswith("triton.") and module not in prepared:
            prepared.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
