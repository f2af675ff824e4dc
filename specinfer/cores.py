"""Processor cores by number: lists of them, those that are here, and binding a process to some.

Two pools of compute threads on the same cores ruin each other, so tiers of one machine are told
apart. Knows the operating system only: nothing of workers, models or tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from specinfer.errors import InvalidRequest

# Compute threads of a process. What OpenMP cannot start may end the process without a word.
MAX_THREADS = 1024
_MOST_CORES = 4096
_TOPOLOGY = Path("/sys/devices/system/cpu")
_THREADS = Path("/proc/self/task")


def parse_cores(text: str) -> tuple[int, ...]:
    """Numbers of a list such as "0-3,8", in rising order; "" is none.

    Raises:
        InvalidRequest: when it cannot be read or names a core twice.
    """
    cores: list[int] = []
    for part in text.split(",") if text.strip() else ():
        first, dash, last = (side.strip() for side in part.partition("-"))
        numbers = (first, last) if dash else (first, first)
        if not all(side.isascii() and side.isdigit() and len(side) < 6 for side in numbers):
            raise InvalidRequest(f"cores are a list such as 0-3,8, not {text!r}", field="cores")
        start, end = int(numbers[0]), int(numbers[1])
        if end < start or end >= _MOST_CORES:
            raise InvalidRequest(
                f"{part.strip()!r} is no range of cores below {_MOST_CORES}", field="cores"
            )
        cores += range(start, end + 1)
    if len(set(cores)) < len(cores):
        raise InvalidRequest(f"{text!r} names a core twice", field="cores")
    return tuple(sorted(cores))


def format_cores(cores: Iterable[int]) -> str:
    """The list that `parse_cores` reads, with ranges."""
    ranges: list[list[int]] = []
    for core in sorted(cores):
        if ranges and core == ranges[-1][1] + 1:
            ranges[-1][1] = core
        else:
            ranges.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def usable_cores() -> tuple[int, ...]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def whole_cores(cores: Iterable[int]) -> tuple[int, ...]:
    """One of the hardware threads of each physical core: a second one adds no arithmetic."""
    kept: list[int] = []
    for core in sorted(cores):
        siblings = _siblings(core)
        if not any(other in siblings for other in kept):
            kept.append(core)
    return tuple(kept)


def _siblings(core: int) -> tuple[int, ...]:
    try:
        listing = _TOPOLOGY / f"cpu{core}" / "topology" / "thread_siblings_list"
        return parse_cores(listing.read_text(encoding="ascii").strip())
    except (OSError, InvalidRequest):
        return (core,)


def bind_process(cores: tuple[int, ...]) -> None:
    """Keep every thread of this process, and those they start later, on these cores.

    Raises:
        InvalidRequest: when one of them is not here, or the system binds nothing.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise InvalidRequest("this system binds no process to cores", field="cores")
    missing = sorted(set(cores) - set(usable_cores()))
    if missing or not cores:
        raise InvalidRequest(
            f"this process may use the cores {format_cores(usable_cores())}, "
            f"not {format_cores(missing) or 'none'}",
            field="cores",
        )
    for thread in [int(entry.name) for entry in _THREADS.iterdir()]:
        try:
            os.sched_setaffinity(thread, cores)
        except ProcessLookupError:
            continue  # it has ended since
