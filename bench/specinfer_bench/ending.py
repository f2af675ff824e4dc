"""How a benchmark's processes end: this one when it is told to, and those that it started.

This module knows nothing of what they do.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

END_SECONDS = 30.0


def exit_on_term() -> None:
    """Let SIGTERM end this process the way that ends what it has started, too."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def end_process(process: subprocess.Popen[Any]) -> None:
    """Have a process end: when it has ended what it started, and soon in any case."""
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
