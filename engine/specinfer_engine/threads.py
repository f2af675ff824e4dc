"""How many compute threads a worker takes, and on which cores. Knows no model and no session."""

from __future__ import annotations

import contextlib

import torch

from specinfer.cores import bind_process


def take_cores(cores: tuple[int, ...], num_threads: int) -> None:
    """Bind this process to `cores` and compute with so many threads; none and 0 change nothing.

    With cores and no number there is one thread a core. Call it before the model is loaded: memory
    comes from the node of the core that first writes it.

    Raises:
        InvalidRequest: when a core is not there.
    """
    if cores:
        bind_process(cores)
    if num_threads or cores:
        torch.set_num_threads(num_threads or len(cores))
    # No op of ours runs beside another. torch refuses once such threads have been used.
    if torch.get_num_interop_threads() != 1:
        with contextlib.suppress(RuntimeError):
            torch.set_num_interop_threads(1)
