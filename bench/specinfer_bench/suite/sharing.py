"""A cluster for parts in a row that want the same target: started once, not for each of them.

This module knows nothing of what parts measure.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from specinfer_bench.load.cluster import Cluster, demo_cluster
from specinfer_bench.suite.parts import BY_FILE, Part

FILE = "cluster.json"


class SharedCluster:
    """At most one cluster at a time, from the first part that joins it to the first that does not.

    Args:
        folder: where the file that tells parts of it is while it runs.
        root: where parts run, above `folder`.
        start: starts a cluster of a target grown to a preset.
    """

    def __init__(
        self,
        folder: Path,
        root: Path,
        start: Callable[[str], AbstractContextManager[Cluster]] = demo_cluster,
    ) -> None:
        self._file, self._root = folder / FILE, root
        self._start = start
        self._running = ExitStack()
        self._grow = ""
        self._cluster: Cluster = {}

    def joined(self, part: Part) -> tuple[str, ...]:
        """A part's command on the cluster that it joins, or as it is by itself.

        A cluster of another target ends; the one that it joins is started unless it runs.

        Raises:
            SpecinferError: when the cluster does not start.
        """
        if not part.joins or part.grow != self._grow:
            self.end()
        if not part.joins:
            return part.command
        if not self._grow:
            self._cluster = self._running.enter_context(self._start(part.grow))
            self._running.callback(self._file.unlink)
            self._file.write_text(json.dumps(dict(self._cluster)), encoding="utf-8")
            self._grow = part.grow
        by_file = part.joins == BY_FILE
        told = self._file.relative_to(self._root) if by_file else self._cluster["router"]
        return (*part.words, part.joins, str(told))

    def end(self) -> None:
        """End the cluster that runs, if any."""
        self._grow, self._cluster = "", {}
        self._running.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
