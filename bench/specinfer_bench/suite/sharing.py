"""A cluster for parts in a row that want the same target: started once, not for each of them.

This module knows nothing of what parts measure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from specinfer.errors import SpecinferError, Unavailable
from specinfer_bench.ending import end_process
from specinfer_bench.load.cluster import DEMO, START_SECONDS, Cluster, demo_cluster
from specinfer_bench.suite.parts import BY_ADDRESS, BY_FILE, Part

Start = Callable[[str, float], AbstractContextManager[Cluster]]


@contextmanager
def grown_cluster(grow: str, seconds: float) -> Iterator[Cluster]:
    """The demo pair's cluster, its target grown to a preset: in so many seconds, both together.

    Raises:
        Unavailable: when the target is not grown or the cluster does not start, or not in time.
    """
    # In a process of its own: it takes much memory where the target is not there yet.
    command = [sys.executable, "-m", "specinfer_bench.grown", str(DEMO / "target"), grow]
    deadline = time.monotonic() + seconds
    try:
        growing = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    except OSError as error:
        raise Unavailable(f"the target cannot be grown: {error}") from error
    try:
        status = growing.wait(seconds)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"the target does not grow within {seconds:.0f} seconds") from error
    finally:
        end_process(growing)
    if status:
        raise Unavailable(f"growing the target ended with {status}; it said why above")
    with demo_cluster(grow, seconds=deadline - time.monotonic()) as cluster:
        yield cluster


class SharedCluster:
    """At most one cluster at a time, from the first part that joins it to the first that does not.

    Attributes:
        had_answered: whether the cluster that the last part joined had answered others before.

    Args:
        start: starts a cluster of a target grown to a preset, within some seconds.
    """

    def __init__(self, start: Start = grown_cluster) -> None:
        self.had_answered = False
        self._start = start
        self._running = ExitStack()
        self._grow = ""
        self._told: dict[str, str] = {}
        self._failed: dict[str, SpecinferError] = {}

    def joined(self, part: Part, seconds: float) -> tuple[str, ...]:
        """A part's command on the cluster that it joins, or as it is by itself.

        A cluster of another target ends; the one that it joins is started unless it runs.

        Raises:
            SpecinferError: when the cluster does not start within so many seconds, or did not
                before.
        """
        self.had_answered = bool(self._grow and part.joins) and part.grow == self._grow
        if not self.had_answered:
            self.close()
        if not part.joins:
            return part.command
        if not self._grow:
            self._begin(part.grow, seconds)
        return (*part.words, part.joins, self._told[part.joins])

    def _begin(self, grow: str, seconds: float) -> None:
        if grow in self._failed:
            raise self._failed[grow]
        try:
            start = self._start(grow, min(seconds, START_SECONDS))
            cluster = self._running.enter_context(start)
        except SpecinferError as error:
            self._failed[grow] = error
            raise
        folder = self._running.enter_context(tempfile.TemporaryDirectory())
        file = Path(folder) / "cluster.json"
        file.write_text(json.dumps(dict(cluster)), encoding="utf-8")
        self._told = {BY_ADDRESS: str(cluster["router"]), BY_FILE: str(file)}
        self._grow = grow

    def close(self) -> None:
        """End the cluster that runs, if any; another may be joined after it."""
        self._grow = ""
        self._running.close()
