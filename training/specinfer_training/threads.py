"""Chooses how many threads to compute with while other work shares the machine.

A parallel step waits for its slowest thread, so on a busy machine fewer threads are faster.
Meant for a process started with ``nice``: the kernel then counts other work apart from its own.
Refuses to know what is computed.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

_STAT = Path("/proc/stat")
_BUSY_CORE = 0.35


def read_cpu_times(stat: Path = _STAT) -> tuple[int, int] | None:
    """Ticks of all cores spent on work of ordinary priority, and in all; None where unknown."""
    try:
        fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return fields[0], sum(fields)


class SpareThreads:
    """Called before each step; sets torch's thread count to the cores that others leave free."""

    def __init__(self, num_cores: int | None = None, stat: Path = _STAT) -> None:
        self._num_cores = num_cores or os.cpu_count() or 1
        self._stat = stat
        self._last = read_cpu_times(stat)

    def count(self) -> int:
        """Threads to use, judged by what others used since the last call; at least 1."""
        now, last = read_cpu_times(self._stat), self._last
        if now is None or last is None or now[1] <= last[1]:
            return self._num_cores
        self._last = now
        busy = (now[0] - last[0]) / (now[1] - last[1]) * self._num_cores
        return max(1, self._num_cores - int(busy + 1.0 - _BUSY_CORE))

    def __call__(self) -> None:
        torch.set_num_threads(self.count())
