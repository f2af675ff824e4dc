"""Importing a module defines names and does nothing else; the public names are those we say."""

import json
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest

import specinfer

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "specinfer": "specinfer",
    "specinfer_router": "services/router/specinfer_router",
    "specinfer_draft": "services/draft/specinfer_draft",
    "specinfer_verify": "services/verify/specinfer_verify",
    "specinfer_kernels": "kernels/specinfer_kernels",
    "specinfer_engine": "engine/specinfer_engine",
    "specinfer_training": "training/specinfer_training",
    "specinfer_bench": "bench/specinfer_bench",
    "specinfer_cli": "cli/specinfer_cli",
}
WITHOUT_TENSORS = ("specinfer", "specinfer_router")
TENSOR_LIBRARIES = ("torch", "transformers", "triton")
# Prints what the imports left behind, on the last line; anything printed before is a side effect.
WATCH_IMPORTS = """
import importlib, json, os, signal, sys, threading
environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps({
    "threads": [thread.name for thread in threading.enumerate()][1:],
    "environment": dict(os.environ) != environment,
    "signals": signal.getsignal(signal.SIGTERM) is not handler,
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
}))
"""


def modules_of(package: str) -> list[str]:
    """Every module of a package but `__main__`, whose job is to have effects."""
    folder = ROOT / PACKAGES[package]
    paths = sorted(folder.rglob("*.py"))
    parts = [path.relative_to(folder.parent).with_suffix("").parts for path in paths]
    return [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts if p[-1] != "__main__"]


@pytest.mark.parametrize("package", WITHOUT_TENSORS)
def test_import_has_no_side_effect_and_no_tensors(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WATCH_IMPORTS, *modules_of(package)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    left = json.loads(line)
    assert left["threads"] == []
    assert not left["environment"]
    assert not left["signals"]
    assert not set(TENSOR_LIBRARIES) & set(left["modules"])


@pytest.mark.parametrize("package", sorted(set(PACKAGES) - set(WITHOUT_TENSORS)))
def test_every_module_imports(package: str) -> None:
    modules = modules_of(package)
    assert modules
    for name in modules:
        import_module(name)


def test_public_names_are_those_in_all() -> None:
    public = {
        name
        for name, value in vars(specinfer).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public <= set(specinfer.__all__), sorted(public - set(specinfer.__all__))
    assert len(set(specinfer.__all__)) == len(specinfer.__all__)
    for name in specinfer.__all__:
        assert hasattr(specinfer, name), name


def test_public_names_are_ours_and_hide_the_wire() -> None:
    for name in specinfer.__all__:
        home = getattr(getattr(specinfer, name), "__module__", "specinfer")
        assert home.partition(".")[0] in ("specinfer", "builtins"), f"{name} is from {home}"
        assert not home.startswith("specinfer.v1"), f"{name} is generated code"


def test_nothing_takes_the_name_of_hugging_face_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
