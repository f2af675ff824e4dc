"""Choice of a backend, and the build: cached by content, atomic, and optional."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import specinfer_kernels
from specinfer_kernels import (
    BackendUnavailableError,
    available_backends,
    backend_name,
    sample_gumbel,
    split_length,
)
from specinfer_kernels.backends import choose_backend
from specinfer_kernels.build import SOURCE_FOLDER, BuildError, build, find_compiler, library_path
from specinfer_kernels.native import native_failure


def test_public_names_exist() -> None:
    assert sorted(specinfer_kernels.__all__, key=str.lower) == sorted(
        set(specinfer_kernels.__all__), key=str.lower
    )
    for name in specinfer_kernels.__all__:
        assert getattr(specinfer_kernels, name) is not None


def test_only_the_gpus_kernel_takes_a_context_in_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert split_length(cpu, torch.bfloat16, 64) is None
    if find_spec("triton") is not None:
        module = sys.modules["specinfer_kernels.tree_attention"]  # the op has its name
        monkeypatch.setattr(module, "choose_backend", lambda *wanted: "triton")
        assert split_length(cpu, torch.bfloat16, 64) == 512


def test_native_where_there_is_a_compiler() -> None:
    try:
        find_compiler()
    except BuildError:
        assert available_backends() == ("reference",)
        return
    assert native_failure() is None
    assert available_backends() == ("native", "reference")
    assert backend_name() == "native"


def test_a_gpu_gets_triton_where_the_op_has_a_kernel() -> None:
    cuda, half = torch.device("cuda"), torch.float16
    fastest = "triton" if find_spec("triton") else "reference"
    assert backend_name(cuda) == fastest
    assert choose_backend(cuda, None, half, (), (half,)) == fastest
    assert choose_backend(cuda, None, half) == "reference"
    with pytest.raises(BackendUnavailableError, match="not of device type 'cuda'"):
        choose_backend(cuda, "native")
    with pytest.raises(BackendUnavailableError, match="no Triton kernel of this op for torch"):
        choose_backend(cuda, "triton", torch.float64, (), (half,))


def test_triton_takes_no_cpu_tensors_unless_it_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailableError, match=r"TRITON_INTERPRET|not installed"):
        choose_backend(cpu, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend_name(cpu) != "triton"


def test_other_dtypes_get_the_reference() -> None:
    cpu = torch.device("cpu")
    assert choose_backend(cpu, None, torch.float16, [torch.float32]) == "reference"
    if native_failure() is None:
        with pytest.raises(BackendUnavailableError, match="float16"):
            choose_backend(cpu, "native", torch.float16, [torch.float32])


def test_an_unknown_backend_is_refused() -> None:
    row = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(BackendUnavailableError, match="unknown backend 'cuda'"):
        sample_gumbel(torch.zeros(1, 4), row, row, row.bool(), backend="cuda")  # type: ignore[arg-type]


def fake_compiler(folder: Path, body: str) -> Path:
    """A program named g++ that answers --version and otherwise runs `body` (sh)."""
    folder.mkdir()
    script = folder / "g++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo fake 1 && exit 0\n{body}\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return folder


# The last argument is where the library goes; each run leaves a mark next to the compiler.
COPY = 'for last; do :; done\nmktemp "$(dirname "$0")/run.XXXXXX" >/dev/null\necho made > "$last"'


def use_compilers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")


def test_a_second_build_finds_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compilers = fake_compiler(tmp_path / "bin", COPY)
    use_compilers(monkeypatch, compilers)
    first = build(tmp_path / "cache")
    assert first.read_text() == "made\n"
    assert build(tmp_path / "cache") == first
    assert len(list(compilers.glob("run.*"))) == 1
    assert list((tmp_path / "cache").iterdir()) == [first]


def test_builds_at_once_leave_one_whole_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compilers(monkeypatch, fake_compiler(tmp_path / "bin", COPY))
    with ThreadPoolExecutor(8) as executor:
        paths = list(executor.map(lambda _: build(tmp_path / "cache"), range(8)))
    assert set(paths) == set((tmp_path / "cache").iterdir())
    assert paths[0].read_text() == "made\n"


def test_another_compiler_means_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compilers(monkeypatch, fake_compiler(tmp_path / "one", COPY))
    first = library_path(find_compiler(), tmp_path)
    other = fake_compiler(tmp_path / "two", COPY) / "g++"
    other.write_text(other.read_text().replace("fake 1", "fake 2"))
    assert library_path(str(other), tmp_path) != first


def test_a_failed_build_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compilers(monkeypatch, fake_compiler(tmp_path / "bin", "echo no such header >&2; exit 1"))
    with pytest.raises(BuildError, match="no such header"):
        build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_compiler_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C"):
        build(tmp_path / "cache")


def test_the_users_cache_folder_is_honoured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compilers(monkeypatch, fake_compiler(tmp_path / "bin", COPY))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "named"))
    assert library_path(find_compiler()).parent == tmp_path / "named" / "specinfer" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert library_path(find_compiler()).parent.parent.parent == tmp_path / "home" / ".cache"


def test_a_user_without_a_home_is_a_build_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    use_compilers(monkeypatch, fake_compiler(tmp_path / "bin", COPY))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(BuildError, match="no folder to keep the library in"):
        build()


def test_without_a_compiler_the_reference_serves(tmp_path: Path) -> None:
    """In a process that finds no compiler and no cached library."""
    package = Path(specinfer_kernels.__file__).parent.parent
    code = (
        "import torch, specinfer_kernels as kernels\n"
        "assert kernels.available_backends() == ('reference',)\n"
        "row = torch.zeros(1, dtype=torch.int64)\n"
        "print(kernels.sample_gumbel(torch.zeros(1, 4), row, row, row.bool()).shape)\n"
    )
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("value", "native"), [("off", False), ("FALSE", False), ("on", True)])
def test_native_kernels_that_are_there_can_be_turned_off(value: str, native: bool) -> None:
    if native_failure() is not None:
        pytest.skip("they are not there")
    code = (
        "import specinfer_kernels\n"
        "from specinfer_kernels.native import native_failure\n"
        "print(specinfer_kernels.backend_name(), native_failure())\n"
    )
    environment = {**os.environ, "SPECINFER_NATIVE_KERNELS": value}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    off = "reference SPECINFER_NATIVE_KERNELS has turned the native kernels off"
    assert said.stdout.strip() == ("native None" if native else off)


def test_sources_ship_with_the_package() -> None:
    assert {"kernels.cpp", "attention.h", "sampling.h", "vectors.h"} <= {
        source.name for source in SOURCE_FOLDER.iterdir()
    }
