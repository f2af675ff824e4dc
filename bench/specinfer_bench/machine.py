"""What machine a benchmark ran on, as far as it matters to its numbers."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def machine_facts() -> dict[str, object]:
    """Processor, cores and memory; a fact that cannot be read is left out."""
    facts: dict[str, object] = {
        "processor": _processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()}, Python {platform.python_version()}",
    }
    if "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        facts["memory_gib"] = round(memory / 2**30, 1)
    return facts


def commit_of(root: Path) -> str:
    """The commit that runs, and whether its code was changed; "" outside of a repository.

    What benchmarks write themselves is no change.
    """
    git = ["git", "-C", str(root)]
    written = [f":!{name}" for name in ("bench/results", "docs", "README.md")]
    commands = (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", *written])
    try:
        commit, changes = (
            subprocess.run([*git, *command], capture_output=True, check=True, text=True).stdout
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.strip() + (", changed" if changes else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "")
