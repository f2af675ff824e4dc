"""Everything that is measured on a GPU, in one command: `python -m specinfer_bench.gpu --help`.

Kernels beside their peers, a whole step of a target of 7 billion parameters, and tokens per second
beside `transformers` on the same card; one file `bench/results/gpu-NAME.json` for each part. Parts
are processes: one that fails or hangs is told of with its reason, and the next one runs. The target
is a grown one, made once and kept in the cache (14 GB, minutes). This module measures nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from specinfer.errors import Unavailable
from specinfer_bench.ending import exit_on_term
from specinfer_bench.suite.parts import Part
from specinfer_bench.suite.running import DONE, PartResult, run_parts

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
GROWN = "7b"
_KERNELS = ("attention", "linear", "rows", "sampling")
_KERNEL_SECONDS, _MODEL_SECONDS, _BUDGET_SECONDS = 540.0, 1800.0, 7200.0


def parts() -> dict[str, Part]:
    """The parts by their names."""
    found = [_kernel(name) for name in _KERNELS]
    found.append(
        Part(
            "gpu-step",
            "one pass: products, attention and the rest",
            ("python", "-m", "specinfer_bench.gpu_step"),
            _MODEL_SECONDS,
            grow=GROWN,
        )
    )
    found.append(
        Part(
            "gpu-peers",
            "tokens per second beside transformers",
            ("python", "-m", "specinfer_bench.gpu_peers"),
            _MODEL_SECONDS,
            grow=GROWN,
        )
    )
    return {part.name.removeprefix("gpu-"): part for part in found}


def _kernel(name: str) -> Part:
    script = f"bench/kernels/gpu_{name}.py"
    return Part(f"gpu-{name}", f"kernels: {name}", ("python", script), _KERNEL_SECONDS)


def require_cuda() -> None:
    """Raise Unavailable unless there is a CUDA device."""
    if not torch.cuda.is_available():
        raise Unavailable("there is no CUDA device here; nothing was measured")


def measure(names: list[str]) -> dict[str, PartResult]:
    """Run parts by name, in order.

    Raises:
        Unavailable: without a CUDA device.
    """
    require_cuda()
    known = parts()
    chosen = [known[name] for name in names]
    return dict(run_parts(chosen, ROOT, RESULTS, _BUDGET_SECONDS, tell=print))


def main() -> int:
    """Measure; 1 when a part is not done, 2 without a CUDA device."""
    parser = argparse.ArgumentParser(
        prog="python -m specinfer_bench.gpu", description=(__doc__ or "").splitlines()[0]
    )
    exit_on_term()
    names = list(parts())
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these parts alone")
    try:
        results = measure(parser.parse_args().only)
    except Unavailable as error:
        print(f"Unavailable: {error.message}", file=sys.stderr)
        return 2
    missed = {name: part for name, part in results.items() if part.state != DONE}
    for name, part in missed.items():
        print(f"{name}: {part.state}: {part.reason}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
