"""Installing the SDK alone installs no torch: the built wheel in an empty environment."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {"specinfer", "grpcio", "protobuf", "typing-extensions", "pip", "setuptools"}
HEAVY = ("torch", "transformers", "numpy", "redis", "grpc_health", "rich", "typer")
USE_THE_SDK = f"""
import json, sys
import specinfer.testing
client = specinfer.Client("127.0.0.1:1")
client.close()
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""


def run(*command: str | Path) -> str:
    """Run a command away from the checkout; fail with its output when it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, cwd=ROOT.root
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet")
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (built,) = folder.glob("specinfer-*.whl")
    return built


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel)
    return python


def test_wheel_carries_every_package_and_the_kernel_source(wheel: Path) -> None:
    names = run(sys.executable, "-m", "zipfile", "-l", wheel)
    packages = ("kernels", "engine", "router", "draft", "verify", "training", "cli", "bench")
    for package in ("specinfer", *(f"specinfer_{name}" for name in packages)):
        assert f"{package}/__init__.py" in names, f"the wheel has no {package}"
    assert "specinfer/py.typed" in names
    assert "specinfer/v1/router_pb2.pyi" in names
    assert "specinfer_kernels/csrc/" in names
    assert ".so " not in names


def test_bare_install_brings_grpc_and_nothing_heavy(bare_python: Path) -> None:
    listing = run(bare_python, "-m", "pip", "list", "--format=json")
    installed = {entry["name"].lower().replace("_", "-") for entry in json.loads(listing)}
    assert installed <= ALLOWED, f"unexpected: {sorted(installed - ALLOWED)}"


def test_bare_install_makes_a_client(bare_python: Path) -> None:
    assert json.loads(run(bare_python, "-I", "-W", "error", "-c", USE_THE_SDK)) == []


def test_the_command_says_which_extra_it_needs(bare_python: Path) -> None:
    done = subprocess.run(
        [bare_python.parent / "specinfer", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "specinfer[cli]" in done.stderr
    assert "Traceback" not in done.stderr
