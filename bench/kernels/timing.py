"""Interleaved timing: every candidate once a round, so that a machine whose speed wanders treats
all alike. Times are medians; ratios are taken round by round and then their median. With one
thread the clock is that thread's processor time, which other processes disturb least."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.nn import functional

PEAK_SIZE = 1024  # rows, columns and depth of the product that the matrix peak is taken from


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for round_index in range(rounds + 1):
        for name, run in candidates.items():
            start = clock()
            run()
            took = clock() - start
            if round_index:
                seconds[name].append(took)
    return seconds


def peak_candidates(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Candidates whose seconds `pop_peaks` takes out again."""
    # Where a processor cannot multiply bfloat16, float32 is what its arithmetic comes down to.
    squares = {
        kind: torch.ones(PEAK_SIZE, PEAK_SIZE, dtype=kind) for kind in (dtype, torch.float32)
    }
    return {
        f"peak {kind}": partial(functional.linear, square, square)
        for kind, square in squares.items()
    }


def pop_peaks(seconds: dict[str, list[float]]) -> list[float]:
    """Seconds of the large product in the faster of the formats, for each round."""
    names = [name for name in seconds if name.startswith("peak ")]
    return [min(both) for both in zip(*(seconds.pop(name) for name in names), strict=True)]


def print_row(label: str, seconds: Mapping[str, list[float]], base: str) -> None:
    """One line: the base's milliseconds, and of each other its time divided by the base's."""
    parts = [f"{base} {statistics.median(seconds[base]) * 1e3:8.3f} ms"]
    for name, times in seconds.items():
        if name != base:
            ratios = [mine / its for mine, its in zip(times, seconds[base], strict=True)]
            parts.append(f"{name} x{statistics.median(ratios):.2f}")
    print(f"{label:44s} " + "   ".join(parts), flush=True)


def parse_arguments(
    description: str, add_options: Callable[[argparse.ArgumentParser], None] | None = None
) -> argparse.Namespace:
    """--rounds, --threads and what a bench adds; sets torch's threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    if add_options is not None:
        add_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{description}, {arguments.threads} threads, {arguments.rounds} rounds")
    return arguments
