"""Starts a router in front of simulated workers. Knows nothing of how those behave."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import Any

from specinfer.errors import Unavailable
from specinfer_bench.load.cluster import Cluster

WORKERS = "specinfer_bench.load.simulated"
START_SECONDS = 60.0
END_SECONDS = 20.0
POLL_SECONDS = 0.05


@contextmanager
def simulated_cluster() -> Iterator[Cluster]:
    """Workers that are waits and a real router before them, for the length of the block.

    Raises:
        Unavailable: when the router does not serve in time.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = Popen([sys.executable, "-m", WORKERS], stdout=PIPE, text=True)
        stack.callback(_end, workers)
        assert workers.stdout is not None
        line = workers.stdout.readline()
        if not line:
            raise Unavailable("the simulated workers ended before they served")
        found = json.loads(line)
        command = [sys.executable, "-m", "specinfer_router", "--grpc", "127.0.0.1:0"]
        command += ["--gateway", "127.0.0.1:0", "--drain-seconds", "1"]
        command += ["--draft", found["draft"], "--verify", found["verify"]]
        with (folder / "router.log").open("w") as log:
            router = Popen(command, stderr=log)
        stack.callback(_end, router)
        ports = _serving(router, folder / "router.log")
        yield {
            "router": f"127.0.0.1:{ports['grpc_port']}",
            "gateway": f"127.0.0.1:{ports['gateway_port']}",
            "model": "simulated",
            "model_hash": "simulated",
            "dtype": "none",
        }


def _serving(router: Popen[bytes], log: Path) -> dict[str, Any]:
    """The line of a router's log that says where it serves."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and router.poll() is None:
        lines = log.read_text(encoding="utf-8").split("\n")[:-1]
        found = [json.loads(line) for line in lines if '"serving"' in line]
        if found:
            ports: dict[str, Any] = found[0]
            return ports
        time.sleep(POLL_SECONDS)
    raise Unavailable("the router before the simulated workers does not serve")


def _end(process: Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except TimeoutExpired:
        process.kill()
        process.wait()
