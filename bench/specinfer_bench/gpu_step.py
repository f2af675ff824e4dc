"""Where one pass of a target goes on a GPU: products, attention, and the rest; and what
row-invariance costs.

    python -m specinfer_bench.gpu_step --grow 7b --output bench/results/gpu-step.json

A step is timed as the engine runs it, from the rows on the host to a logit on the host, with CUDA
graphs and without. Kernels are told apart by their names in torch's profiler; the rest is the step
less the kernels of products and attention, gaps included. Goal: less than 10 %. `--check` runs it
on the demo's target on a CPU and measures nothing. Knows no kernel but by name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from specinfer.errors import Unavailable
from specinfer_bench.gpu import require_cuda
from specinfer_bench.grown import grown_target
from specinfer_bench.options import GROWN_PRESETS
from specinfer_engine.batch import SequenceRows
from specinfer_engine.graphs import capture_for
from specinfer_engine.loader import load_model
from specinfer_engine.model import LoadedModel
from specinfer_engine.runner import Runner
from specinfer_kernels import PackedLinear, pack_linear

DEMO_TARGET = Path(__file__).resolve().parents[2] / "models" / "demo" / "target"
BLOCK_SIZE = 16
PRODUCT, ATTENTION, REST = "products", "attention", "rest"
# Parts of the names that kernels of products and of attention have, ours and the libraries'.
_NAMES = {
    ATTENTION: ("shared_kernel", "finish_kernel", "plan_kernel", "flash", "fmha"),
    PRODUCT: ("linear_kernel", "fold_kernel", "gemm", "gemv", "nvjet", "cutlass", "xmma", "splitk"),
}
_PROFILED_STEPS = 10
# (sequences, rows of each, context): plain decoding, trees, and a piece of a prompt.
SHAPES = ((1, 1, 256), (1, 16, 1024), (1, 64, 1900), (8, 8, 1024), (64, 1, 1024), (1, 256, 0))
SMALL_SHAPES = ((1, 1, 20), (3, 4, 20))
LINEAR_ROWS = (1, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class StepRow:
    """One shape of pass. Milliseconds of a step; None where the profiler says nothing.

    Attributes:
        num_sequences, num_rows, context: `num_rows` rows of each sequence after its context.
        graphs: whether the pass was replayed.
        step_ms: median from rows to logits, on the host's clock.
        products_ms, attention_ms, rest_ms: kernels of each kind.
        overhead: share of the step that is neither products nor attention.
    """

    num_sequences: int
    num_rows: int
    context: int
    graphs: bool
    step_ms: float
    products_ms: float | None
    attention_ms: float | None
    rest_ms: float | None
    overhead: float | None


@dataclass(frozen=True)
class LinearRow:
    """All products of a pass but the head's: ours, whose rows are invariant, and the library's."""

    num_rows: int
    ours_ms: float
    library_ms: float
    price: float


def kernel_kind(name: str) -> str:
    """What a kernel is for, by its name."""
    lowered = name.lower()
    for kind, parts in _NAMES.items():
        if any(part in lowered for part in parts):
            return kind
    return REST


def make_rows(num_sequences: int, num_rows: int, context: int) -> list[SequenceRows]:
    """Chains after contexts of their own, on blocks side by side."""
    blocks = -(-(context + num_rows) // BLOCK_SIZE)
    return [
        SequenceRows.chain(
            [(7 * row + index) % 1000 for row in range(num_rows)],
            context,
            range(index * blocks, (index + 1) * blocks),
            range(num_rows),
        )
        for index in range(num_sequences)
    ]


def run_step(runner: Runner, rows: list[SequenceRows]) -> float:
    """Milliseconds of a step; reading a value makes the device finish."""
    start = time.perf_counter()
    runner.forward(rows)[0][0, 0].item()
    return (time.perf_counter() - start) * 1e3


def kernel_milliseconds(runner: Runner, rows: list[SequenceRows]) -> Mapping[str, float] | None:
    """Milliseconds of a step in the kernels of each kind, or None where nothing was recorded."""
    if runner.loaded.device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(_PROFILED_STEPS):
            run_step(runner, rows)
    totals = {PRODUCT: 0.0, ATTENTION: 0.0, REST: 0.0}
    for event in recorded.key_averages():
        if event.device_type.name == "CUDA":
            totals[kernel_kind(event.key)] += event.self_device_time_total / 1e3 / _PROFILED_STEPS
    return totals if any(totals.values()) else None


def step_row(runner: Runner, shape: tuple[int, int, int], graphs: bool, rounds: int) -> StepRow:
    """Time and take apart one shape of pass."""
    rows = make_rows(*shape)
    run_step(runner, rows)
    step = statistics.median(run_step(runner, rows) for _ in range(rounds))
    kinds = kernel_milliseconds(runner, rows)
    if kinds is None:
        return StepRow(*shape, graphs, step, None, None, None, None)
    overhead = 1 - (kinds[PRODUCT] + kinds[ATTENTION]) / step
    return StepRow(*shape, graphs, step, kinds[PRODUCT], kinds[ATTENTION], kinds[REST], overhead)


def step_rows(loaded: LoadedModel, check: bool, rounds: int) -> Iterator[StepRow]:
    """All shapes, replayed and not."""
    shapes = SMALL_SHAPES if check else SHAPES
    num_blocks = max(
        sequences * -(-(context + rows) // BLOCK_SIZE) for sequences, rows, context in shapes
    )
    for graphs in (True, False):
        capture = capture_for(graphs, loaded.device, loaded.dtype)
        runner = Runner(loaded, num_blocks=num_blocks, block_size=BLOCK_SIZE, capture=capture)
        for shape in shapes:
            yield step_row(runner, shape, graphs, rounds)


def linear_rows(loaded: LoadedModel, check: bool, rounds: int) -> Iterator[LinearRow]:
    """The products of one layer, times the number of layers; more weights than the caches hold."""
    config = loaded.model.config
    width, heads = config.hidden_size, loaded.num_heads * loaded.head_dim
    joined = heads + 2 * loaded.num_kv_heads * loaded.head_dim
    shapes = (
        *((joined, width), (width, heads)),
        *((2 * config.intermediate_size, width), (width, config.intermediate_size)),
    )
    weights = [
        torch.randn(shape, device=loaded.device).to(loaded.dtype) / width**0.5 for shape in shapes
    ]
    layers = [pack_linear(weight) for weight in weights]
    for num_rows in (2,) if check else LINEAR_ROWS:
        inputs = [
            torch.randn(num_rows, weight.shape[1], device=loaded.device).to(loaded.dtype)
            for weight in weights
        ]
        took: dict[str, list[float]] = {"ours": [], "library": []}
        for index in range(rounds + 1):
            for name, times in took.items():
                seconds = _products_seconds(name, layers, weights, inputs)
                if index:
                    times.append(seconds * 1e3 * loaded.num_layers)
        ours, library = (statistics.median(took[name]) for name in ("ours", "library"))
        yield LinearRow(num_rows, ours, library, ours / library)


@torch.inference_mode()
def _products_seconds(
    name: str, layers: list[PackedLinear], weights: list[Tensor], inputs: list[Tensor]
) -> float:
    """Seconds of one layer's products, by the device's clock where there is one."""
    on_device = inputs[0].device.type == "cuda"
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_device else []
    start = time.perf_counter()
    if events:
        # Work ahead of the first event hides how long launches take on the host.
        torch.cuda._sleep(2_000_000)
        events[0].record()
    for layer, weight, rows in zip(layers, weights, inputs, strict=True):
        if name == "ours":
            layer(rows)
        else:
            functional.linear(rows, weight)
    if not events:
        return time.perf_counter() - start
    events[1].record()
    events[1].synchronize()
    return float(events[0].elapsed_time(events[1])) / 1e3


def gpu_step_parser() -> argparse.ArgumentParser:
    """Arguments of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m specinfer_bench.gpu_step", description="where one pass goes on a GPU"
    )
    parser.add_argument("--grow", choices=GROWN_PRESETS, help="size; default: the demo's own")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="JSON file for the tables")
    parser.add_argument("--check", action="store_true", help="run once on a CPU, measure nothing")
    return parser


def main() -> int:
    """Measure, print and write; 2 without a CUDA device."""
    arguments = gpu_step_parser().parse_args()
    check, rounds = arguments.check, 1 if arguments.check else arguments.rounds
    try:
        if not check:
            require_cuda()
    except Unavailable as error:
        print(f"Unavailable: {error.message}", file=sys.stderr)
        return 2
    grow = arguments.grow
    target = grown_target(DEMO_TARGET, grow, arguments.dtype) if grow else DEMO_TARGET
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    loaded = load_model(target, dtype=arguments.dtype, device=device)
    result: dict[str, object] = {
        "command": " ".join(["python", "-m", "specinfer_bench.gpu_step", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if device != "cpu" else device,
        "torch": torch.__version__,
        "row_invariant": loaded.row_invariant,
        "steps": _told(step_rows(loaded, check, rounds)),
        "products": _told(linear_rows(loaded, check, rounds)),
    }
    if arguments.output is not None and not check:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _told(rows: Iterator[StepRow] | Iterator[LinearRow]) -> list[dict[str, object]]:
    """The rows as plain data, each printed when it is there."""
    told = []
    for row in rows:
        told.append(asdict(row))
        print("  ".join(f"{name} {value}" for name, value in told[-1].items()), flush=True)
    return told


if __name__ == "__main__":
    sys.exit(main())
