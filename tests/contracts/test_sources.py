"""What our sources may not contain: code from data, shells, bare excepts, unfinished work."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATED = Path("specinfer/v1")
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "yaml.load", "os.system", "pickle.loads"}
FORBIDDEN_TRUE = {"trust_remote_code", "shell", "allow_pickle"}
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|HA" + r"CK|XX" + r"X)\b")


def tracked_files(*patterns: str) -> list[Path]:
    """Files that git tracks or would track, relative to the root, without generated code."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *patterns]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = sorted({Path(name) for name in listing.split("\0") if name})
    return [p for p in paths if GENERATED not in p.parents and (ROOT / p).is_file()]


def dotted_name(node: ast.expr) -> str:
    """`a.b.c` of a name or an attribute, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return ""


def imported_modules(node: ast.AST) -> list[str]:
    """Top-level names of the modules that this node imports."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module.partition(".")[0]]
    return []


def is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def loads_openly(node: ast.Call) -> bool:
    """Whether this is a torch.load that may run code; with weights_only=True it runs none."""
    safe = any(word.arg == "weights_only" and is_true(word.value) for word in node.keywords)
    return dotted_name(node.func) == "torch.load" and not safe


def forbidden_in(source: str) -> Iterator[str]:
    """Yield `line: what` for each forbidden thing in Python source."""
    for node in ast.walk(ast.parse(source)):
        for module in imported_modules(node):
            if module in FORBIDDEN_MODULES:
                yield f"{node.lineno}: import of {module}"  # type: ignore[attr-defined]
        if isinstance(node, ast.Call) and dotted_name(node.func) in FORBIDDEN_CALLS:
            yield f"{node.lineno}: call of {dotted_name(node.func)}"
        if isinstance(node, ast.Call) and loads_openly(node):
            yield f"{node.lineno}: torch.load without weights_only=True"
        if isinstance(node, ast.keyword) and node.arg in FORBIDDEN_TRUE and is_true(node.value):
            yield f"{node.lineno}: {node.arg}=True"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{node.lineno}: bare except"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f(x):\n    return eval(x)",
        "torch.load(path)",
        "torch.load(path, weights_only=flag)",
        "load(path, trust_remote_code=True)",
        "run(command, shell=True)",
        "try:\n    f()\nexcept:\n    g()",
    ],
)
def test_the_check_finds_what_is_forbidden(source: str) -> None:
    assert list(forbidden_in(source))


def test_the_check_lets_harmless_code_pass() -> None:
    assert not list(forbidden_in("model.eval()\nload(trust_remote_code=False)\nrun(shell=False)"))


def test_sources_hold_nothing_forbidden() -> None:
    found = [
        f"{path}:{what}"
        for path in tracked_files("*.py")
        for what in forbidden_in((ROOT / path).read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_nothing_is_left_unfinished() -> None:
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in tracked_files("*.py", "*.cpp", "*.h", "*.proto", "Makefile", "*.toml", "*.md")
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1)
        if UNFINISHED.search(line)
    ]
    assert not found, "\n".join(found)


def test_every_package_module_says_what_it_does() -> None:
    silent = [
        str(path)
        for path in tracked_files("*.py")
        if not ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    ]
    assert not silent, silent
