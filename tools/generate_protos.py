"""Write specinfer/v1 from protos/specinfer/v1, or check that it is what the protos give.

Run it with the pinned generators of protos/requirements.txt (`make protos` does). The same protos
always give the same bytes, so the check is a comparison of two folders. It knows nothing of what
the messages mean.
"""

import argparse
import filecmp
import importlib.resources
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("specinfer/v1")
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
INIT_TEXT = '"""Generated from protos/specinfer/v1 by `make protos`. Never edited by hand."""\n'


def generate(output: Path) -> None:
    """Generate the whole package into `output`/specinfer/v1, which must not exist yet.

    Raises RuntimeError when protoc refuses a file; protoc itself says where on standard error.
    """
    # The generators live in an environment of their own, so the project's checkers cannot see them.
    from grpc_tools import protoc  # type: ignore[import-untyped, import-not-found, unused-ignore]

    sources = sorted((ROOT / "protos" / PACKAGE).glob("*.proto"))
    services = [path for path in sources if "\nservice " in path.read_text(encoding="utf-8")]
    includes = [
        f"-I{ROOT / 'protos'}",
        f"-I{importlib.resources.files('grpc_tools') / '_proto'}",
        *(f"--plugin={Path(sys.executable).parent / name}" for name in PLUGINS),
    ]
    (output / PACKAGE).mkdir(parents=True)
    messages = [f"--python_out={output}", f"--mypy_out={output}"]
    # Only files with a service get _pb2_grpc modules: the others would be empty.
    stubs = [f"--grpc_python_out={output}", f"--mypy_grpc_out={output}"]
    for flags, paths in ((messages, sources), (stubs, services)):
        if paths and protoc.main(["protoc", *includes, *flags, *map(str, paths)]) != 0:
            raise RuntimeError("protoc failed")
    (output / PACKAGE / "__init__.py").write_text(INIT_TEXT, encoding="utf-8")


def differences(fresh: Path, committed: Path) -> list[str]:
    """Return one line for each file of the two folders that is missing, extra or not the same."""
    ours = {path.name for path in committed.glob("*.py*") if path.is_file()}
    made = {path.name for path in fresh.glob("*.py*")}
    lines = [f"missing: {name}" for name in sorted(made - ours)]
    lines += [f"no proto gives it: {name}" for name in sorted(ours - made)]
    lines += [
        f"out of date: {name}"
        for name in sorted(ours & made)
        if not filecmp.cmp(fresh / name, committed / name, shallow=False)
    ]
    return lines


def replace_committed(fresh: Path, committed: Path) -> None:
    """Make `committed` hold the files of `fresh` and no other module."""
    committed.mkdir(parents=True, exist_ok=True)
    for path in committed.glob("*.py*"):
        path.unlink()
    for path in sorted(fresh.iterdir()):
        shutil.copyfile(path, committed / path.name)


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate specinfer/v1 from the protos.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 on a diff")
    check: bool = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh, committed = Path(folder) / PACKAGE, ROOT / PACKAGE
        if not check:
            replace_committed(fresh, committed)
            return 0
        lines = differences(fresh, committed)
    for line in lines:
        print(f"{PACKAGE}: {line}", file=sys.stderr)
    if lines:
        print("run `make protos` and commit the result", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
