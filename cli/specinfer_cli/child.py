"""Runs one service as a child that cannot outlive its launcher.

`python -m specinfer_cli.child specinfer_verify --model ...` runs that service's `__main__`. Its
stdin is a pipe from the launcher: when the launcher ends, even by SIGKILL, the pipe ends too, and
this process asks itself to drain and, if it does not, ends.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading

GRACE_SECONDS = 15.0


def main() -> None:
    """Watch the launcher, then become the service named by the first argument."""
    module = sys.argv[1]
    del sys.argv[1]
    watcher = threading.Thread(target=_end_with_launcher, name="launcher-watch", daemon=True)
    watcher.start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_launcher() -> None:
    # Unbuffered and blocking: a reader of sys.stdin would hold its lock at exit.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
