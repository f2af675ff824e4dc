"""Hold the size rules: functions of at most 60 lines (p90 30), files of at most 400.

Counts the Python files that git tracks, or would track, outside generated code. A function's lines
run from its `def` to its last statement. It judges size alone, never style.
"""

import ast
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENERATED = Path("specinfer/v1")
MAX_FUNCTION_LINES = 60
MAX_P90_LINES = 30
MAX_FILE_LINES = 400


def python_files() -> list[Path]:
    """Return our Python files, relative to the root, sorted, without the generated ones."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "*.py"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = {Path(name) for name in listing.split("\0") if name}
    return sorted(p for p in paths if GENERATED not in p.parents and (ROOT / p).exists())


def function_lengths(source: str) -> Iterator[tuple[str, int, int]]:
    """Yield (name, first line, number of lines) of every function in `source`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            last = node.end_lineno if node.end_lineno is not None else node.lineno
            yield node.name, node.lineno, last - node.lineno + 1


def percentile_90(lengths: list[int]) -> int:
    """Return the smallest length that nine tenths of the functions do not exceed."""
    return sorted(lengths)[math.ceil(0.9 * len(lengths)) - 1] if lengths else 0


def main() -> int:
    complaints: list[str] = []
    lengths: list[int] = []
    files = python_files()
    for path in files:
        source = (ROOT / path).read_text(encoding="utf-8")
        num_lines = source.count("\n")
        if num_lines > MAX_FILE_LINES:
            complaints.append(f"{path}: {num_lines} lines, the cap is {MAX_FILE_LINES}")
        for name, line, length in function_lengths(source):
            lengths.append(length)
            if length > MAX_FUNCTION_LINES:
                complaints.append(
                    f"{path}:{line}: {name} has {length} lines, the cap is {MAX_FUNCTION_LINES}"
                )
    p90 = percentile_90(lengths)
    if p90 > MAX_P90_LINES:
        complaints.append(f"nine tenths of the functions fit in {p90} lines, not {MAX_P90_LINES}")
    print(f"{len(files)} files, {len(lengths)} functions, p90 {p90} lines", *complaints, sep="\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
