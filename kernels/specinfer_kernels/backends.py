"""Which implementation of an op runs: chosen by device and dtype, or named by the caller.

`native` is the C++ library of `csrc/` (CPU), `triton` the kernels of `triton/` (CUDA, or a CPU
through Triton's interpreter when named), `reference` is plain torch (any device). Knows no op and
no model.
"""

from collections.abc import Iterable
from typing import Literal

import torch

from specinfer_kernels.errors import BackendUnavailableError
from specinfer_kernels.native import native_failure
from specinfer_kernels.native_linear import bfloat16_products
from specinfer_kernels.triton.runtime import triton_failure

Backend = Literal["reference", "native", "triton"]


def available_backends(device: torch.device | str = "cpu") -> tuple[Backend, ...]:
    """The backends that an op may take by itself for tensors of `device`, fastest first."""
    first = choose_backend(torch.device(device), None)
    return ("reference",) if first == "reference" else (first, "reference")


def backend_name(device: torch.device | str = "cpu") -> Backend:
    """The backend that the ops take by themselves for tensors of `device`, where they have it."""
    return choose_backend(torch.device(device), None)


def describe_backend(device: torch.device | str = "cpu") -> str:
    """`backend_name`, with what multiplies bfloat16 where that differs between processors.

    Workers whose descriptions differ may give other bits, and so may others.
    """
    name = backend_name(device)
    return f"{name}, bfloat16 by {bfloat16_products()}" if name == "native" else name


def choose_backend(
    device: torch.device,
    requested: str | None,
    dtype: torch.dtype | None = None,
    native_dtypes: Iterable[torch.dtype] = (),
    triton_dtypes: Iterable[torch.dtype] = (),
) -> Backend:
    """The backend for one call of an op that takes these dtypes in C++ and in Triton.

    Raises BackendUnavailableError when `requested` cannot serve this device or dtype.
    """
    if requested is None:
        return _first_backend(device, dtype, native_dtypes, triton_dtypes)
    if requested == "reference":
        return "reference"
    if requested == "native":
        return _unless("native", _native_refusal(device, dtype, native_dtypes))
    if requested == "triton":
        return _unless("triton", _triton_refusal(device, dtype, triton_dtypes))
    raise BackendUnavailableError(
        f"unknown backend {requested!r}; known: reference, native, triton"
    )


def _first_backend(
    device: torch.device,
    dtype: torch.dtype | None,
    native_dtypes: Iterable[torch.dtype],
    triton_dtypes: Iterable[torch.dtype],
) -> Backend:
    if device.type == "cpu":  # never Triton's interpreter, which is there for tests
        return "reference" if _native_refusal(device, dtype, native_dtypes) else "native"
    return "reference" if _triton_refusal(device, dtype, triton_dtypes) else "triton"


def _unless(backend: Backend, refusal: str | None) -> Backend:
    if refusal:
        raise BackendUnavailableError(refusal)
    return backend


def _native_refusal(
    device: torch.device, dtype: torch.dtype | None, native_dtypes: Iterable[torch.dtype]
) -> str | None:
    if device.type != "cpu":
        return (
            f"the native kernels take tensors of a CPU, not of device type {device.type!r}: "
            "use backend='reference', which runs on any device"
        )
    if dtype is not None and dtype not in native_dtypes:
        return f"the native kernel does not take {dtype}"
    return native_failure()


def _triton_refusal(
    device: torch.device, dtype: torch.dtype | None, triton_dtypes: Iterable[torch.dtype]
) -> str | None:
    if dtype is not None and dtype not in triton_dtypes:
        return f"there is no Triton kernel of this op for {dtype}"
    return triton_failure(device)
