"""What `make bench` runs: each part a command of its own, with a limit of its own.

Parts that share a cluster stand together, and kernels come late, for what the time does not reach
is left out. This module runs nothing.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

KERNELS = Path("bench/kernels")
NO_BENCH = ("timing.py", "results.py")
# These need a GPU: `specinfer_bench.gpu` runs them.
GPU_PREFIX = "gpu_"
KERNEL_PREFIX = "kernels-"
KERNEL_SECONDS = 60.0
# Where a bench by itself would take longer than there is time here.
KERNEL_OPTIONS = {
    "packed_linear.py": ("--rows", "1,8,16,32"),
    "whole_pass.py": ("--model", "1b", "--contexts", "64", "--rows", "1,2,4,8,16,32"),
}
# What the others are parts of.
KERNELS_FIRST = ("packed_linear.py", "whole_pass.py")
SPEED_PREFIX = "speed-"
# How parts are told of a cluster that runs: by its router's address, or by a file.
BY_ADDRESS, BY_FILE = "--router", "--cluster"


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: of the part and of the file that it leaves, without ".json".
        title: what people call it.
        words: the command without --grow; its first word is `python` or a script beside it.
        limit_seconds: after so long it is ended.
        grow: the size that the demo's target is grown to for it, or "".
        joins: the option that gives it a running cluster of that target, which parts in a row
            share, or "".
        writes: whether it takes --output; otherwise what it prints is kept.
    """

    name: str
    title: str
    words: tuple[str, ...]
    limit_seconds: float
    _: KW_ONLY
    grow: str = ""
    joins: str = ""
    writes: bool = True

    @property
    def command(self) -> tuple[str, ...]:
        """What runs it by itself."""
        return (*self.words, *(("--grow", self.grow) if self.grow else ()))


def _speed(grow: str, temperature: str, *options: str) -> Part:
    return Part(
        f"{SPEED_PREFIX}{grow}-t{temperature}",
        f"speculation off and on, {grow}, temperature {temperature}",
        ("specinfer", "bench", "--temperature", temperature, *options),
        limit_seconds=180.0,
        grow=grow,
        joins=BY_ADDRESS,
    )


def _load(name: str, title: str, words: str) -> Part:
    words = f"python -m specinfer_bench.load {words}"
    return Part(f"load-{name}", title, tuple(words.split()), 180.0, grow="200m", joins=BY_FILE)


def _peers(name: str, title: str, words: str, limit_seconds: float, *skipped: str) -> Part:
    command = ["python", "-m", "specinfer_bench.peers", *words.split()]
    if skipped:
        command += ["--skip", *skipped]
    return Part(name, title, tuple(command), limit_seconds, grow=name.rpartition("-")[2])


def _router(name: str, title: str, *loads: str, windows: int = 3) -> Part:
    words = ["python", "-m", "specinfer_bench.router_cost", "--windows", str(windows)]
    for load in loads:
        words += ["--load", load]
    return Part(f"router-{name}", title, tuple(words), limit_seconds=90.0)


_SHORT_200M = ("--num-prompts", "6", "--repeats", "1")
_SHORT_1B = ("--num-prompts", "3", "--max-tokens", "40", "--repeats", "1")
# All numbers of sessions, and more turns, take ten minutes: bench/results has them.
_SWEEP = "sweep --sessions 1,4,16,64 --max-tokens 24 --repeats 6 --max-seconds 110"
_OPEN = "open --rate 2.5 --requests 28 --max-tokens 32"
_RATES = "rates --rates 2,8 --seconds 3 --max-tokens 24"
_SIMULATED = (
    "python -m specinfer_bench.load sweep --simulated --sessions 1,4,16,32,64 --max-tokens 16"
    " --repeats 3 --max-seconds 75"
)
_PEERS = "--num-prompts 2 --max-tokens 32 --max-seconds 32"
# What is near enough to take the machine's mood for the difference: two loads each.
_PLAIN = f"{_PEERS} --plain --temperatures 0 --loads 2"
_SHORT_PEERS = "--num-prompts 2 --max-tokens 24 --max-seconds 50 --repeats 1 --temperatures 0"
_ONE_PROCESS = "specinfer in one process"
_SLOWER = (_ONE_PROCESS, "transformers", "OpenVINO GenAI", "vLLM", "SGLang")
# With noise: one of the ideas is about that.
_ABLATIONS = "python -m specinfer_bench.peers.ablations --temperatures 0.8"
_IDEAS = f"{_ABLATIONS} --num-prompts 3 --max-tokens 48 --repeats 2 --max-seconds 20 --layouts"
# Last, and few tokens: where a processor cannot multiply bfloat16, a pass without packing takes ten
# times as long as with it.
_NO_PACKING = f"{_ABLATIONS} --num-prompts 1 --max-tokens 16 --repeats 1 --no-ideas --layouts plain"

# Those that share a cluster stand together.
PARTS = (
    _speed("200m", "0", *_SHORT_200M),
    _speed("200m", "0.8", *_SHORT_200M),
    _load("sweep", "speed by number of sessions", _SWEEP),
    _load("open-off", "requests at random times, speculation off", f"{_OPEN} --speculation off"),
    _load(
        "open-by-cost",
        "requests at random times, speculation chosen by cost",
        f"{_OPEN} --speculation by_cost",
    ),
    _load("rates", "requests at random times, by how many come", _RATES),
    _speed("1b", "0", *_SHORT_1B),
    _speed("1b", "0.8", *_SHORT_1B),
    _peers("plain-200m", "plain decoding beside llama.cpp's, 200m", _PLAIN, 150.0, *_SLOWER),
    _peers("peers-200m", "other engines, 200m", f"{_PEERS} --repeats 2", 180.0),
    # Two targets of ours at once would leave the others little memory.
    _peers("peers-1b", "other engines, 1b", _SHORT_PEERS, 240.0, _ONE_PROCESS),
    Part(
        "load-simulated",
        "speed by number of sessions, a target of stated cost",
        tuple(_SIMULATED.split()),
        limit_seconds=120.0,
    ),
    _router(
        "cost",
        "the router's processor time",
        "64 long sessions of one client, answers at once",
        "64 sessions of one client, answers at once",
        "64 long sessions, answers at once",
    ),
    _router(
        "loss",
        "the cluster against one process at steps of 50 ms",
        # As the SDK asks.
        "1 session on a shared call, steps of 50 ms",
        windows=5,
    ),
    Part(
        "overlap",
        "drafting and committing beside verifying",
        tuple("python -m specinfer_bench.overlap".split()),
        limit_seconds=90.0,
    ),
    Part("ablations", "what each idea brings", tuple(_IDEAS.split()), 120.0, grow="200m"),
)

PACKING = Part(
    "ablations-packing", "what packing brings", tuple(_NO_PACKING.split()), 120.0, grow="200m"
)


def all_parts(root: Path) -> tuple[Part, ...]:
    """The parts, among them one for each benchmark of kernels below `root`."""
    found = sorted(path.name for path in (root / KERNELS).glob("*.py"))
    files = sorted(found, key=lambda name: name not in KERNELS_FIRST)
    here = [name for name in files if name not in NO_BENCH and not name.startswith(GPU_PREFIX)]
    return (*PARTS, *(_kernel(name) for name in here), PACKING)


def _kernel(file: str) -> Part:
    name = file.removesuffix(".py")
    return Part(
        KERNEL_PREFIX + name.replace("_", "-"),
        f"kernels: {name.replace('_', ' ')}",
        ("python", str(KERNELS / file), "--rounds", "5", *KERNEL_OPTIONS.get(file, ())),
        KERNEL_SECONDS,
        writes=False,
    )
