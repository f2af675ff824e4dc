"""Grown targets, made once and kept in the user's cache folder. Needs the `model` extra.

A grown target computes what the small one computes and costs what a large one costs; see
`specinfer_training.grow`. This module knows nothing of clusters or prompts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from specinfer.errors import InvalidRequest
from specinfer_bench.ending import exit_on_term

# Nobody takes as long to grow a target: what is older was left by one that was killed.
STALE_SECONDS = 3600.0


def grown_target(source: Path, preset: str, dtype: str, cache: Path | None = None) -> Path:
    """Folder of `source` grown to a preset, made if it is not in the cache yet.

    Args:
        source: folder of a Llama checkpoint.
        preset: "200m", "1b" or "7b".
        dtype: number format of the grown weights.
        cache: where grown targets are kept; None takes the user's cache folder.

    Raises:
        InvalidRequest: when the checkpoint cannot be grown.
    """
    folder = cache or default_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{source.parent.name}-{preset}-{dtype}-{_fingerprint(source)}"
        if not (target / "config.json").is_file():
            _grow(source, target, preset, dtype)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidRequest(f"cannot grow {source}: {error}", field="grow") from error
    return target


def _grow(source: Path, target: Path, preset: str, dtype: str) -> None:
    # Here and not above: they take seconds to import, and most runs find the target made.
    import torch

    from specinfer_training.grow import grow_checkpoint

    prefix = f".{target.name}-"
    _remove_stale(target.parent.glob(f"{prefix}*"))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as temporary:
        made = Path(temporary) / "grown"
        grow_checkpoint(source, made, preset, getattr(torch, dtype))
        # A rename shows the folder whole or not at all, whoever else makes it at the same time.
        if not target.exists():
            made.rename(target)


def _remove_stale(folders: Iterable[Path]) -> None:
    """Remove those of `folders` that somebody left long ago."""
    for folder in folders:
        # Who makes the same one at the same time removes them, too.
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def default_cache() -> Path:
    """The user's cache folder by the XDG rules."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "specinfer" / "grown"


def main() -> None:
    """Grow a checkpoint in a process of its own: `python -m specinfer_bench.grown FOLDER SIZE`."""
    # What is half made is removed, as where anything fails.
    exit_on_term()
    source, preset = sys.argv[1:]
    print(grown_target(Path(source), preset, "bfloat16"))


def _fingerprint(source: Path) -> str:
    digest = hashlib.sha256((source / "config.json").read_bytes())
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb") as weights:
            while chunk := weights.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    main()
