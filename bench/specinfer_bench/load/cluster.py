"""The cluster that a load is put on: one that runs, or one started for it by `specinfer up`.

This module knows nothing of loads.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specinfer.errors import InvalidRequest, Unavailable
from specinfer_bench.ending import end_process
from specinfer_bench.grown import grown_target

DEMO = Path(__file__).resolve().parents[3] / "models" / "demo"
START_SECONDS = 300.0
COMMAND_LINE = "specinfer_cli.main"
FACTS = ("router", "gateway", "model", "model_hash", "dtype")
Cluster = Mapping[str, Any]
"""What `specinfer up --json` printed."""


def given_cluster(path: Path) -> Cluster:
    """A running cluster by its file; raises InvalidRequest when the file is another one."""
    try:
        return _facts(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {path}: {error}", field="cluster") from error


@contextmanager
def started_cluster(arguments: Sequence[str], seconds: float = START_SECONDS) -> Iterator[Cluster]:
    """Run `specinfer up` with some arguments for the length of the block.

    It has so many seconds to start.

    Raises:
        Unavailable: when it is not up in time, or ends.
    """
    # In our process group, so that whoever ends that ends this too; and it ends by itself where
    # we are not asked to end but killed.
    command = [sys.executable, "-m", "specinfer_cli.child", COMMAND_LINE, "up", "--json"]
    command += ["--admin", "", "--grpc", "127.0.0.1:0", "--gateway", "127.0.0.1:0", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield _facts(_announced(process, seconds))
        finally:
            end_process(process)


@contextmanager
def demo_cluster(
    grow: str | None, dtype: str = "bfloat16", seconds: float = START_SECONDS
) -> Iterator[Cluster]:
    """The demo pair's cluster for the length of the block, its target grown to a preset or not.

    Raises:
        InvalidRequest: when the target cannot be grown.
        Unavailable: as `started_cluster`.
    """
    flags = ["--dtype", dtype]
    if grow is not None:
        target = grown_target(DEMO / "target", grow, dtype)
        flags += ["--model", str(target), "--draft", str(DEMO / "draft")]
    with started_cluster(flags, seconds) as cluster:
        yield cluster


def _announced(process: subprocess.Popen[str], seconds: float) -> str:
    """The line that it prints once every process is healthy."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], max(0.0, seconds))
    if not ready:
        raise Unavailable(f"specinfer up is not up within {seconds:.0f} seconds")
    line = process.stdout.readline()
    if not line:
        raise Unavailable(f"specinfer up ended with {process.wait()}; it said why above")
    return line


def _facts(text: str) -> Cluster:
    try:
        found: Cluster = json.loads(text)
        missing = [name for name in FACTS if name not in found]
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"not what `specinfer up --json` prints: {error}") from error
    if missing:
        raise InvalidRequest(f"the cluster's facts lack {', '.join(missing)}", field="cluster")
    return found
