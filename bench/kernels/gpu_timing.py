"""What the benches of GPU kernels share: timing by events, floors, a table kept as JSON.

The floor of a kernel is the larger of its bytes at the measured copy rate and its operations at the
measured matrix rate; `floor` in a row is the time over it. Candidates take turns, with the cache
filled with something else before each, which also hides how long a launch takes. `--check` runs
every case once at small sizes, on a CPU as well, and measures nothing. Knows no kernel.
"""

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from specinfer_kernels import BackendUnavailableError

FLUSH_BYTES = 1 << 30
RATE_BYTES = 1 << 30
RATE_SIZE = 8192
RATE_ROUNDS = 10

log = logging.getLogger(__name__)

Candidates = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Work:
    """What a kernel cannot do without: bytes that it reads and writes, and operations of products
    of `dtype`, a multiplication and an addition being two."""

    num_bytes: int
    num_operations: int = 0
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """One line of a table: medians in milliseconds, and why a candidate has none."""

    label: str
    milliseconds: Mapping[str, float]
    floor_ms: float
    num_bytes: int
    num_operations: int
    absent: Mapping[str, str]

    def text(self) -> str:
        """The line as it is printed, our time over the floor and the others' over ours."""
        ours = self.milliseconds.get("ours")
        parts = [self.label.ljust(52)]
        if ours is not None:
            parts.append(f"ours {ours:8.4f} ms = {ours / self.floor_ms:5.2f} floors")
            others = {name: took for name, took in self.milliseconds.items() if name != "ours"}
            parts += [f"{name} x{took / ours:.2f}" for name, took in others.items()]
        return "  ".join(parts + [f"{name}: {why}" for name, why in self.absent.items()])


class Bench:
    """A table that is being made.

    Args:
        name: what is measured.
        arguments: as `parse` returned them.
    """

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name = name
        self.check: bool = arguments.check
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._rounds: int = arguments.rounds
        self._output: Path | None = arguments.output
        self.rows: list[Row] = []

    def measure(
        self, label: str, work: Work, candidates: Candidates, absent: Mapping[str, str]
    ) -> None:
        """Time the candidates in turn and print the row; one that fails says why instead."""
        running, failed = _those_that_run(candidates)
        absent = {**absent, **failed}
        if self.check:
            print(f"{label.ljust(52)}  ran: {', '.join(running)}  {dict(absent) or ''}", flush=True)
            if "ours" not in running:
                raise RuntimeError(f"{label}: {absent['ours']}")
            return
        seconds = interleaved(running, self._rounds)
        row = Row(
            label,
            {name: statistics.median(times) * 1e3 for name, times in seconds.items()},
            floor_seconds(work, copy_rate(), matrix_rate(work.dtype)) * 1e3,
            work.num_bytes,
            work.num_operations,
            absent,
        )
        self.rows.append(row)
        print(row.text(), flush=True)

    def finish(self) -> None:
        """Write the table, if it is to be kept."""
        if self._output is None or self.check:
            return
        table = {
            "bench": self.name,
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "rounds": self._rounds,
            "copy_bytes_per_second": copy_rate(),
            "rows": [asdict(row) for row in self.rows],
        }
        self._output.parent.mkdir(parents=True, exist_ok=True)
        self._output.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def parse(description: str) -> argparse.Namespace:
    """--rounds, --output and --check; ends the process with the reason without a CUDA device."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="JSON file for the table")
    parser.add_argument("--check", action="store_true", help="run small cases once, also on a CPU")
    arguments = parser.parse_args()
    try:
        if not arguments.check:
            require_cuda()
    except BackendUnavailableError as error:
        sys.exit(f"{description}: {error}")
    return arguments


def require_cuda() -> None:
    """Raise BackendUnavailableError unless there is a CUDA device."""
    if not torch.cuda.is_available():
        raise BackendUnavailableError("there is no CUDA device here, and nothing was measured")


def floor_seconds(work: Work, bytes_per_second: float, operations_per_second: float) -> float:
    """The larger of the two times that nothing on this device can do without."""
    return max(
        work.num_bytes / bytes_per_second,
        work.num_operations / operations_per_second if work.num_operations else 0.0,
    )


def interleaved(candidates: Candidates, rounds: int) -> dict[str, list[float]]:
    """Seconds on the device of each candidate in each round; one round before does not count."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds + 1):
        for name, run in candidates.items():
            flush.zero_()
            took = _event_seconds(run)
            if index:
                seconds[name].append(took)
    return seconds


def _event_seconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _those_that_run(candidates: Candidates) -> tuple[Candidates, dict[str, str]]:
    """Run each once: what works, and why the others do not."""
    running: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    for name, run in candidates.items():
        try:
            run()
            running[name] = run
        except Exception as error:
            # Compilers fail in ways of their own; one candidate must not end the bench.
            log.exception("%s does not run", name)
            failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
    return running, failed


@cache
def copy_rate() -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(RATE_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, RATE_ROUNDS)["copy"]
    return 2 * RATE_BYTES / min(seconds)


@cache
def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large square product of a dtype."""
    left = torch.randn(RATE_SIZE, RATE_SIZE, device="cuda").to(dtype)
    right = torch.randn(RATE_SIZE, RATE_SIZE, device="cuda").to(dtype)
    seconds = interleaved({"product": lambda: left @ right}, RATE_ROUNDS)["product"]
    return 2 * RATE_SIZE**3 / min(seconds)
