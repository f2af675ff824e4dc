"""Portable libraries beside the package, for images without a compiler.

`python -m specinfer_kernels.prebuilt` compiles `csrc/` once for each processor level of this
architecture into `prebuilt/`; a process takes the highest level that its processor has. The name
of a library hashes its sources and options, so one that was left behind is never loaded. The
arithmetic is the same sequence of operations as in a build for the machine itself. Two levels
differ where one lacks fused multiply-add in 64-byte vectors, and in bfloat16 where the processor
multiplies pairs or matrices, which only the highest level makes use of. Knows files, not loading.
"""

import hashlib
import platform
import sys
from pathlib import Path

from specinfer_kernels.build import (
    COMMON_OPTIONS,
    SOURCE_FOLDER,
    BuildError,
    compile_library,
    find_compiler,
)

PREBUILT_FOLDER = Path(__file__).parent / "prebuilt"
_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# Level as the compiler names it, highest first, and what the processor must have for it.
LEVELS: dict[str, dict[str, frozenset[str]]] = {
    "x86_64": {"x86-64-v4": _V4, "x86-64-v3": _V3},
    "aarch64": {"armv8-a": frozenset({"asimd"})},
}


def find_prebuilt(
    folder: Path | None = None, features: frozenset[str] | None = None
) -> Path | None:
    """The library of the highest level that this processor, or one of `features`, can run."""
    features = processor_features() if features is None else features
    for level, needed in LEVELS.get(platform.machine(), {}).items():
        path = (folder or PREBUILT_FOLDER) / _file_name(level)
        if needed <= features and path.exists():
            return path
    return None


def build_all(folder: Path | None = None) -> tuple[Path, ...]:
    """Compile every level of this architecture. Raises BuildError."""
    compiler, made = find_compiler(), []
    # Unlike a user's cache: whoever runs the image's process reads what its builder wrote.
    (folder or PREBUILT_FOLDER).mkdir(parents=True, exist_ok=True, mode=0o755)
    for level in LEVELS.get(platform.machine(), {}):
        path = (folder or PREBUILT_FOLDER) / _file_name(level)
        compile_library(compiler, _options(level), path)
        made.append(path)
    return tuple(made)


def processor_features() -> frozenset[str]:
    """The processor's features as Linux lists them; none where it does not."""
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return frozenset()
    for line in listing.read_text().splitlines():
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(values.split())
    return frozenset()


def _options(level: str) -> tuple[str, ...]:
    return (*COMMON_OPTIONS, f"-march={level}")


def _file_name(level: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCE_FOLDER.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update("\0".join(_options(level)).encode())
    return f"specinfer_kernels-{level}-{digest.hexdigest()[:20]}.so"


def main() -> int:
    """Build all levels and say where; an image that was to hold them fails without."""
    try:
        for path in build_all():
            print(f"native kernels: {path}")
    except BuildError as error:
        print(f"native kernels not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
