"""Compiles `csrc/` with the machine's own compiler: `python -m specinfer_kernels.build`.

The library lands in the user's cache folder under a name that hashes the sources, the compiler,
its options and the processor's features, so a new source or another machine on the same home
never meets an old library. A build goes to a temporary name and is renamed, so several may run at
once. Knows how to build, not how to load.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE_FOLDER = Path(__file__).parent / "csrc"
_COMPILERS = ("g++", "c++", "clang++")
# No -ffast-math and no contraction: the order and the roundings of every sum are the contract.
COMMON_OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC", "-w")
_TIMEOUT_SECONDS = 300


class BuildError(RuntimeError):
    """The library could not be built: no compiler, or what the compiler said."""


def find_compiler() -> str:
    """Path of a C++ compiler. Raises BuildError when the machine has none."""
    for name in _COMPILERS:
        path = shutil.which(name)
        if path:
            return path
    raise BuildError(f"no C++ compiler found (looked for {', '.join(_COMPILERS)})")


def library_path(compiler: str, cache: Path | None = None) -> Path:
    """Where the library for these sources, this compiler and this processor belongs.

    Raises BuildError when no folder is given and the user has none.
    """
    digest = hashlib.sha256()
    for source in sorted(SOURCE_FOLDER.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    for part in (_run([compiler, "--version"]), *_options(), _processor_features()):
        digest.update(b"\0" + part.encode())
    folder = cache or _user_cache() / "specinfer" / "kernels"
    return folder / f"specinfer_kernels-{digest.hexdigest()[:20]}.so"


def build(cache: Path | None = None) -> Path:
    """Path of the library, compiled now unless it is there. Raises BuildError."""
    compiler = find_compiler()
    target = library_path(compiler, cache)
    if not target.exists():
        compile_library(compiler, _options(), target)
    return target


def compile_library(compiler: str, options: tuple[str, ...], target: Path) -> None:
    """Compile `csrc/` to `target`, which is there whole or not at all. Raises BuildError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            source = SOURCE_FOLDER / "kernels.cpp"
            _run([compiler, *options, str(source), "-o", str(made)])
            os.replace(made, target)
    except OSError as error:
        raise BuildError(f"cannot write the library to {target.parent}: {error}") from error


def _user_cache() -> Path:
    """XDG_CACHE_HOME, which counts only when absolute, or .cache in the home folder."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise BuildError(f"no folder to keep the library in: {error}") from error


def _options() -> tuple[str, ...]:
    # On arm64 GCC takes the processor's features from -mcpu.
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return (*COMMON_OPTIONS, native)


def _processor_features() -> str:
    """What -march=native would look at, as far as the system says it."""
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = {line for line in listing.read_text().splitlines() if line.startswith(wanted)}
    return "\n".join(sorted(lines))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> int:
    """Build and say where; a machine without a compiler is told what it loses, not failed."""
    try:
        path = build()
    except BuildError as error:
        print(f"native kernels not built, the slower reference will serve: {error}")
        return 0
    print(f"native kernels: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
