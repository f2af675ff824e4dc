"""Builds llama.cpp from the sources in llama-cpp-python's source distribution on PyPI.

`python -m specinfer_bench.peers.build_llama_cpp` needs cmake, ninja or make, a C++17 compiler and
pip; with two cores it takes about ten minutes. Sources and programs land in the user's cache
folder, never in this tree. The version is pinned, because our driver calls functions that llama.cpp
does not promise to keep. This module knows nothing of models.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from specinfer_bench.grown import default_cache

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
DRIVER = "bin/specinfer-llama-driver"
TREE = "bin/llama-speculative"
_TARGETS = ("specinfer-llama-driver", "llama-speculative")
_SOURCES = f"llama_cpp_python-{VERSION}/vendor/llama.cpp"
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
_HERE = Path(__file__).parent


class BuildError(RuntimeError):
    """llama.cpp could not be fetched or built; the message says which step failed and how."""


def built_folder(cache: Path | None = None) -> Path:
    """Where the programs are once they are built; paths in it are DRIVER and TREE.

    The name holds the version, our driver's source and the processor's features, so that nothing
    built from another source or for another machine is taken for it.
    """
    digest = hashlib.sha256(VERSION.encode())
    for name in ("llama_driver.cpp", "driver.cmake"):
        digest.update((_HERE / name).read_bytes())
    for line in Path("/proc/cpuinfo").read_text().splitlines() if _has_cpuinfo() else ():
        if line.startswith("flags"):
            digest.update(line.encode())
            break
    return (cache or default_cache().parent) / "llama.cpp" / digest.hexdigest()[:16]


def build(cache: Path | None = None, jobs: int | None = None) -> Path:
    """Fetch, check and build; returns the folder of `built_folder`. Takes minutes.

    Args:
        cache: where to keep sources and programs; None takes the user's cache folder.
        jobs: compilers that run at once; None takes the cores of this process.

    Raises:
        BuildError: when a step fails.
    """
    target = built_folder(cache)
    sources = target.parent / f"sources-{VERSION}"
    if not (sources / _SOURCES).is_dir():
        _fetch(sources)
    target.mkdir(parents=True, exist_ok=True)
    # llama.cpp's own build takes our driver in through a hook, without a change to its sources.
    hook = f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={_HERE / 'driver.cmake'}"
    _run(["cmake", "-S", str(sources / _SOURCES), "-B", str(target), hook, *_OPTIONS])
    jobs = jobs or len(os.sched_getaffinity(0))
    _run(["cmake", "--build", str(target), "-j", str(jobs), "--target", *_TARGETS])
    return target


def _fetch(folder: Path) -> None:
    """Download the source distribution, check its hash and unpack llama.cpp alone."""
    with tempfile.TemporaryDirectory() as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", "llama-cpp-python", "--require-hashes"]
        _run([*command, "-r", str(requirements), "--dest", temporary])
        (archive,) = Path(temporary).glob("*.tar.gz")
        _unpack(archive, folder)


def _unpack(archive: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as temporary,
        tarfile.open(archive) as opened,
    ):
        members = [member for member in opened if member.name.startswith(_SOURCES + "/")]
        opened.extractall(temporary, members=members, filter="data")
        Path(temporary).rename(folder)
        # The context manager removes what it made: it is to find an empty folder there.
        Path(temporary).mkdir()


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{command[0]}: {error}") from error


def _has_cpuinfo() -> bool:
    return Path("/proc/cpuinfo").is_file()


def main() -> None:
    """Build and print where the programs are."""
    document = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="build_llama_cpp", description=document)
    parser.add_argument("--jobs", type=int, help="compilers at once; default: all cores")
    try:
        print(build(jobs=parser.parse_args().jobs))
    except BuildError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
