"""Which implementation of an op runs: chosen by device and dtype, or named by the caller.

`native` is the C++ library of `csrc/` (CPU), `reference` is plain torch (any device). The GPU
kernels take their place in `choose_backend` when they exist. Knows no op and no model.
"""

from collections.abc import Iterable
from typing import Literal

import torch

from specinfer_kernels.errors import BackendUnavailableError
from specinfer_kernels.native import native_failure

Backend = Literal["reference", "native"]


def available_backends() -> tuple[Backend, ...]:
    """The backends that can run in this process, fastest first."""
    return ("reference",) if native_failure() else ("native", "reference")


def backend_name(device: torch.device | str = "cpu") -> Backend:
    """The backend that the ops take by themselves for tensors of `device`."""
    return choose_backend(torch.device(device), None)


def choose_backend(
    device: torch.device,
    requested: str | None,
    dtype: torch.dtype | None = None,
    native_dtypes: Iterable[torch.dtype] = (),
) -> Backend:
    """The backend for one call.

    Raises BackendUnavailableError when `requested` cannot serve this device or dtype.
    """
    refusal = _native_refusal(device, dtype, native_dtypes)
    if requested is None:
        return "reference" if refusal else "native"
    if requested == "reference":
        return "reference"
    if requested == "native":
        if refusal:
            raise BackendUnavailableError(refusal)
        return "native"
    raise BackendUnavailableError(f"unknown backend {requested!r}; known: reference, native")


def _native_refusal(
    device: torch.device, dtype: torch.dtype | None, native_dtypes: Iterable[torch.dtype]
) -> str | None:
    if device.type != "cpu":
        return (
            f"there is no kernel for device type {device.type!r} yet: "
            "use backend='reference', which runs on any device"
        )
    if dtype is not None and dtype not in native_dtypes:
        return f"the native kernel does not take {dtype}"
    return native_failure()
