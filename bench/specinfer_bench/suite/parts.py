"""What `make bench` runs: each part a command of its own, with a limit of its own.

The most telling parts come first, for what the time does not reach is left out. This module runs
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

KERNELS = Path("bench/kernels")
NO_BENCH = ("timing.py", "results.py")
# These need a GPU: `specinfer_bench.gpu` runs them.
GPU_PREFIX = "gpu_"
KERNEL_PREFIX = "kernels-"
KERNEL_SECONDS = 60.0
# Where a bench by itself would take longer than there is time here.
KERNEL_OPTIONS = {"packed_linear.py": ("--rows", "1,4,8,16,32,64")}


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: of the part and of the file that it leaves, without ".json".
        title: what people call it.
        words: the command; its first word is `python` or a script beside it.
        limit_seconds: after so long it is ended.
        needs: file or folder below the root without which there is no such part, or "".
        writes: whether it takes --output; otherwise what it prints is kept.
    """

    name: str
    title: str
    words: tuple[str, ...]
    limit_seconds: float
    needs: str = ""
    writes: bool = True


def _speed(grow: str, temperature: str, *options: str) -> Part:
    return Part(
        f"speed-{grow}-t{temperature}",
        f"speculation off and on, {grow}, temperature {temperature}",
        (
            *("specinfer", "bench", "--grow", grow, "--temperature", temperature),
            *options,
        ),
        limit_seconds=180.0,
    )


_SHORT_200M = ("--num-prompts", "6", "--repeats", "1")
_SHORT_1B = ("--num-prompts", "3", "--max-tokens", "40", "--repeats", "1")
_SWEEP = "python -m specinfer_bench.load sweep --grow 200m --sessions 1,2,4,8,16,32,64"
_OPEN = "python -m specinfer_bench.load open --grow 200m --rate 2.5 --requests 28 --max-tokens 32"
_PEERS = "python -m specinfer_bench.peers --num-prompts 2 --max-tokens 32 --max-seconds 20"
_SHORT_PEERS = "python -m specinfer_bench.peers --num-prompts 2 --max-tokens 24 --max-seconds 50"
# What is near enough to take the machine's mood for the difference: often, and two loads each.
_PLAIN = f"{_PEERS} --plain --grow 200m --temperatures 0 --repeats 3 --loads 2"
_SLOWER = ("transformers", "OpenVINO GenAI", "vLLM", "SGLang")
# With noise: one of the ideas is about that.
_ABLATIONS = (
    "python -m specinfer_bench.peers.ablations --grow 200m --num-prompts 2 --max-tokens 32"
    " --max-seconds 30 --temperatures 0.8"
)
_ROUTER_COST = "python -m specinfer_bench.router_cost --windows 3"

PARTS = (
    _speed("200m", "0", *_SHORT_200M),
    _speed("200m", "0.8", *_SHORT_200M),
    _speed("1b", "0", *_SHORT_1B),
    _speed("1b", "0.8", *_SHORT_1B),
    Part(
        "load-sweep",
        "speed by number of sessions",
        (*_SWEEP.split(), *"--max-tokens 24 --max-seconds 75".split()),
        limit_seconds=240.0,
    ),
    Part(
        "plain-200m",
        "plain decoding beside llama.cpp's, 200m",
        (*_PLAIN.split(), "--skip", *_SLOWER),
        limit_seconds=150.0,
        needs="bench/specinfer_bench/peers/__main__.py",
    ),
    Part(
        "peers-200m",
        "other engines, 200m",
        (*_PEERS.split(), "--grow", "200m", "--repeats", "2"),
        limit_seconds=180.0,
        needs="bench/specinfer_bench/peers/__main__.py",
    ),
    Part(
        "peers-1b",
        "other engines, 1b",
        (*_SHORT_PEERS.split(), "--grow", "1b", "--repeats", "1", "--temperatures", "0"),
        limit_seconds=240.0,
        needs="bench/specinfer_bench/peers/__main__.py",
    ),
    Part(
        "load-open-off",
        "requests at random times, speculation off",
        (*_OPEN.split(), "--speculation", "off"),
        limit_seconds=120.0,
    ),
    Part(
        "load-open-by-cost",
        "requests at random times, speculation chosen by cost",
        (*_OPEN.split(), "--speculation", "by_cost"),
        limit_seconds=120.0,
    ),
    Part(
        "load-simulated",
        "speed by number of sessions, a target of stated cost",
        tuple(
            "python -m specinfer_bench.load sweep --simulated --max-tokens 16 --repeats 1".split()
        ),
        limit_seconds=120.0,
    ),
    Part(
        "router-cost",
        "the router's processor time",
        (
            *(*_ROUTER_COST.split(), "--load", "64 sessions, answers at once"),
            *("--load", "64 long sessions, answers at once"),
        ),
        limit_seconds=90.0,
        needs="bench/specinfer_bench/router_cost.py",
    ),
    Part(
        "router-loss",
        "the cluster against one process at steps of 50 ms",
        (*_ROUTER_COST.split(), "--load", "1 session, steps of 50 ms"),
        limit_seconds=90.0,
        needs="bench/specinfer_bench/router_cost.py",
    ),
    Part(
        "overlap",
        "drafting and committing beside verifying",
        tuple("python -m specinfer_bench.overlap".split()),
        limit_seconds=90.0,
        needs="bench/specinfer_bench/overlap.py",
    ),
    Part(
        "ablations",
        "what each idea brings",
        tuple(_ABLATIONS.split()),
        limit_seconds=150.0,
        needs="bench/specinfer_bench/peers/ablations.py",
    ),
)

# Where there is time left.
_RATES = Part(
    "load-rates",
    "requests at random times, by how many come",
    tuple(
        "python -m specinfer_bench.load rates --grow 200m --rates 2,4,8 --seconds 3"
        " --max-tokens 24".split()
    ),
    limit_seconds=150.0,
)


def all_parts(root: Path) -> tuple[Part, ...]:
    """The parts, among them one for each benchmark of kernels below `root`."""
    files = sorted(path.name for path in (root / KERNELS).glob("*.py"))
    here = [name for name in files if name not in NO_BENCH and not name.startswith(GPU_PREFIX)]
    return (*PARTS, *(_kernel(name) for name in here), _RATES)


def _kernel(file: str) -> Part:
    name = file.removesuffix(".py")
    return Part(
        KERNEL_PREFIX + name.replace("_", "-"),
        f"kernels: {name.replace('_', ' ')}",
        ("python", str(KERNELS / file), "--rounds", "5", *KERNEL_OPTIONS.get(file, ())),
        KERNEL_SECONDS,
        writes=False,
    )
