"""Which ways through a cluster `specinfer lossless --all-paths` takes, a cluster for each.

The same cases run on each. Clusters of one target have to give the same tokens as well, whatever
lies between a guess and a token. This module knows nothing of cases or reports.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from specinfer import Capabilities
from specinfer.errors import Unavailable
from specinfer.metrics.metric import PREFIX
from specinfer_cli.cluster import ClusterSettings, running_cluster
from specinfer_cli.lossless_check import Tally
from specinfer_cli.processes import Child, held_address

ANSWER_SECONDS = 10.0
MAX_PAGE_BYTES = 4 * 1024 * 1024
AHEAD_TREES = f"{PREFIX}ahead_trees_total{{"
HIT = 'outcome="hit"'
# Workers say what they run on.
_TELLING = ("--log-level", "info")


@dataclass(frozen=True)
class Paths:
    """One way through a cluster.

    Attributes:
        name: what people call it.
        target: what decides the tokens; all paths of one target give the same ones.
        ahead: whether the drafter goes on while the target verifies, and the target computes roots
            of plain decoding before they are asked for.
        unix_sockets: whether the tiers speak over files.
        verify, draft, router: further flags of each.
        environment: further variables of the workers.
        kernels: what every worker's passes have to run on, or "" for whatever is there.
    """

    name: str
    target: str
    ahead: bool = True
    unix_sockets: bool = True
    verify: tuple[str, ...] = ()
    draft: tuple[str, ...] = ()
    router: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    kernels: str = ""

    @property
    def switches(self) -> str:
        """What is switched how, in words of flags."""
        tiers = {"verify": self._verify_flags, "draft": self._draft_flags, "router": self.router}
        words = ["tiers over unix sockets" if self.unix_sockets else "tiers over TCP"]
        words += [f"{tier} {' '.join(flags)}" for tier, flags in tiers.items() if flags]
        words += [f"workers with {name}={value!r}" for name, value in self.environment.items()]
        return ", ".join(words)

    @property
    def _verify_flags(self) -> tuple[str, ...]:
        return ("--roots-ahead", "on" if self.ahead else "off", *self.verify)

    @property
    def _draft_flags(self) -> tuple[str, ...]:
        return ("--ahead", "on" if self.ahead else "off", *self.draft)

    def over(self, base: ClusterSettings, draft_metrics: str) -> ClusterSettings:
        """A cluster's settings with these paths, the drafter's metrics at an address."""
        return replace(
            base,
            unix_sockets=self.unix_sockets,
            verify_flags=(*_TELLING, *self._verify_flags),
            draft_flags=(*_TELLING, *self._draft_flags, "--metrics", draft_metrics),
            router_flags=self.router,
            worker_environment=self.environment,
        )


_INT8 = ("--weights", "int8")
_FP8 = ("--kv-dtype", "fp8")
ALL_PATHS = (
    Paths(
        "the plain paths",
        "stored weights",
        ahead=False,
        unix_sockets=False,
        verify=("--gather", "off"),
        router=("--policy", "static"),
    ),
    Paths("the fast paths", "stored weights"),
    Paths("the fast paths, int8 weights", "int8 weights", verify=_INT8, draft=_INT8),
    Paths("the fast paths, fp8 keys and values", "fp8 KV", verify=_FP8, draft=_FP8),
    # As on a machine without a compiler: torch and oneDNN serve.
    Paths(
        "the fast paths, no native kernels",
        "other kernels",
        environment={"SPECINFER_NATIVE_KERNELS": "off"},
        kernels="reference",
    ),
)


@dataclass(frozen=True)
class CheckedPaths:
    """What a check of one way saw.

    Attributes:
        paths: the way.
        capabilities: of its cluster.
        tally: of the cases.
        seconds: from the start of the cluster to the last case.
        ahead_begun, ahead_hits: trees that the drafter began before they were asked for, and those
            of them that it used; a fast target leaves it little time to.
        kernels: what the workers said that their passes run on, each in turn.
    """

    paths: Paths
    capabilities: Capabilities
    tally: Tally
    seconds: float
    ahead_begun: int
    ahead_hits: int
    kernels: tuple[str, ...]

    @property
    def lossless(self) -> bool:
        """Whether all was equal, and what is switched on was used."""
        wanted = self.paths.kernels
        used = not wanted or (bool(self.kernels) and set(self.kernels) == {wanted})
        return self.tally.lossless and used and (self.ahead_begun > 0) == self.paths.ahead


def check_paths(
    ways: Sequence[Paths],
    base: ClusterSettings,
    check: Callable[[str], tuple[Capabilities, Tally]],
) -> list[CheckedPaths]:
    """Run `check` with the router's address on a cluster for each way, one after the other.

    Raises what `running_cluster` and `check` do, and Unavailable when a drafter's metrics do not
    answer.
    """
    found = []
    for paths in ways:
        begun = time.perf_counter()
        with (
            held_address("--metrics", "127.0.0.1:0") as metrics,
            running_cluster(paths.over(base, metrics)) as cluster,
        ):
            capabilities, tally = check(cluster.router)
            seconds, ahead = time.perf_counter() - begun, ahead_trees(metrics)
            kernels = tuple(map(kernels_of, cluster.children[:-1]))
        found.append(CheckedPaths(paths, capabilities, tally, seconds, *ahead, kernels))
    return found


def kernels_of(worker: Child) -> str:
    """What a worker's log says that its passes run on, or "" where it says nothing."""
    with worker.log.open(encoding="utf-8", errors="replace") as log:
        lines = [line for line in log.read(MAX_PAGE_BYTES).splitlines() if '"kernels"' in line]
    for line in lines:
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and isinstance(said.get("kernels"), str):
            return str(said["kernels"])
    return ""


def ahead_trees(address: str) -> tuple[int, int]:
    """Trees that a draft worker began ahead, and used, by its metrics; raises Unavailable."""
    # Never through a proxy: it is a worker of ours that is asked.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/metrics", timeout=ANSWER_SECONDS) as answer:
            text = answer.read(MAX_PAGE_BYTES).decode("utf-8")
    except OSError as error:
        raise Unavailable(f"the metrics at {address} do not answer: {error}") from error
    lines = [line for line in text.splitlines() if line.startswith(AHEAD_TREES)]
    trees = {line: round(float(line.rpartition("} ")[2].split()[0])) for line in lines}
    return sum(trees.values()), sum(count for line, count in trees.items() if HIT in line)


def apart(found: Sequence[CheckedPaths]) -> list[str]:
    """Names of the ways whose tokens are not those of the first way of the same target."""
    first: dict[str, int] = {}
    return [
        each.paths.name
        for each in found
        if first.setdefault(each.paths.target, each.tally.digest) != each.tally.digest
    ]
