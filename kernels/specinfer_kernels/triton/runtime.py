"""Whether Triton's kernels can run here. Knows no kernel.

Triton decides when it is imported whether its functions are interpreted on the CPU
(TRITON_INTERPRET=1) or compiled for a GPU; one process does one of the two.
"""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# What the kernels multiply: the dtypes of a query.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def is_interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU in this process."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one for a while: it is there that Triton launches."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def triton_failure(device: torch.device) -> str | None:
    """Why Triton cannot serve tensors of this device, or None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'specinfer[gpu]'"
    if device.type == "cpu" and not is_interpreting():
        return "Triton takes tensors of a CPU only in a process started with TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda"):
        return f"there is no Triton kernel for device type {device.type!r}"
    return None
