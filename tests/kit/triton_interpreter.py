"""Triton on a CPU in tests: when to interpret, and an interpreter that does not take minutes.

Knows no kernel. Triton reads TRITON_INTERPRET when it is imported, so the tests' root conftest
calls `interpret_without_a_gpu` before anything can import it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

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


def take_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every op take Triton by itself where it has a kernel, as it does on CUDA."""
    from specinfer_kernels import Backend, backends

    patch_once(monkeypatch)

    def first(
        device: torch.device,
        dtype: torch.dtype | None,
        _native: Iterable[torch.dtype],
        by_triton: Iterable[torch.dtype],
    ) -> Backend:
        return "reference" if backends._triton_refusal(device, dtype, by_triton) else "triton"

    monkeypatch.setattr(backends, "_first_backend", first)
