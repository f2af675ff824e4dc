"""Measured pass costs, kept between starts in the user's cache folder.

A file belongs to one model on one device under one version of the code, and is believed only when
it is whole and says so itself. This module knows nothing of how passes are measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import specinfer_engine
import specinfer_kernels
from specinfer import __version__
from specinfer.messages import StepCost
from specinfer_engine.model import LoadedModel
from specinfer_engine.step_profile import StepProfile

MAX_FILES = 64
MAX_BYTES = 64 * 1024
_SOURCES = (".py", ".cpp", ".h")

log = logging.getLogger(__name__)


def user_folder() -> Path | None:
    """Where profiles are kept by the XDG rules, or None for a user without a home."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        base = named if named.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "specinfer" / "profiles"


def profile_key(loaded: LoadedModel, **more: object) -> dict[str, str]:
    """All that a pass's cost hangs on; `more` names what the caller knows besides."""
    device = loaded.device
    on_gpu = device.type == "cuda"
    return {
        "model": loaded.model_hash,
        "dtype": loaded.dtype_name,
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": str(torch.get_num_threads()),
        "backend": specinfer_kernels.describe_backend(device),
        "version": f"specinfer {__version__}, torch {torch.__version__}",
        "code": _code_hash(),
        **{name: str(value) for name, value in more.items()},
    }


def read_profile(folder: Path, key: Mapping[str, str]) -> StepProfile | None:
    """The costs kept under a key, or None where there are none or they cannot be believed."""
    path = _path(folder, key)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("the measured costs in %s cannot be read: %s", path, error)
        return None
    try:
        return _parse(text, key)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        log.warning("the measured costs in %s are broken and measured again: %s", path, error)
        return None


def write_profile(folder: Path, key: Mapping[str, str], profile: StepProfile) -> None:
    """Keep costs under a key; a folder that cannot be written costs the next start its time."""
    path = _path(folder, key)
    rows = [[cost.num_rows, cost.context_len, cost.seconds] for cost in profile.costs]
    held = {"key": dict(key), "measured_at": profile.measured_at, "costs": rows}
    text = json.dumps(held, indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / path.name
            made.write_text(text, encoding="utf-8")
            # A rename shows the file whole or not at all, whoever else writes it.
            made.replace(path)
        _make_room(folder)
    except OSError as error:
        log.warning("measured costs are not kept in %s: %s", folder, error)


def _parse(text: bytes, key: Mapping[str, str]) -> StepProfile:
    if len(text) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES} bytes")
    held: Any = json.loads(text)
    if held["key"] != dict(key):
        raise ValueError("another key")
    costs = tuple(StepCost(*_point(*point)) for point in held["costs"])
    if not costs:
        raise ValueError("no costs")
    measured_at = held["measured_at"]
    if type(measured_at) is not float or not 0 < measured_at < math.inf:
        raise ValueError("no time")
    return StepProfile(costs, measured_at)


def _point(num_rows: object, context_len: object, seconds: object) -> tuple[int, int, float]:
    if type(num_rows) is not int or type(context_len) is not int or type(seconds) is not float:
        raise TypeError("a point is two whole numbers and one that is not")
    if num_rows < 1 or context_len < 0 or not 0 < seconds < math.inf:
        raise ValueError("a point is out of range")
    return num_rows, context_len, seconds


def _make_room(folder: Path) -> None:
    """Let the oldest files go until there are MAX_FILES; others may do so at the same time."""
    found = sorted(folder.glob("*.json"), key=_written_at)
    for path in found[: max(0, len(found) - MAX_FILES)]:
        path.unlink(missing_ok=True)


def _written_at(path: Path) -> float:
    """When a file was written; the beginning of time for one that is gone meanwhile."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _path(folder: Path, key: Mapping[str, str]) -> Path:
    text = json.dumps(dict(key), sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _code_hash() -> str:
    """Of the code that makes a pass, so that a faster kernel is measured anew."""
    digest = hashlib.sha256()
    for package in (specinfer_kernels, specinfer_engine):
        folder = Path(package.__path__[0])
        for source in sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return f"{platform.machine()} {' '.join(sorted(names))} x{os.cpu_count()}"
