"""What every tool that makes one file of the project does with it: write it, or check it.

This module knows nothing of what is in the file.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_or_check(target: Path, text: str, tool: str) -> int:
    """Write `text`, or with `--check` on the command line say whether that is what `target` holds.

    Returns:
        The exit status: 1 when the file is another one than `tool` makes.
    """
    if "--check" not in sys.argv[1:]:
        target.write_text(text, encoding="utf-8")
        return 0
    if target.exists() and target.read_text(encoding="utf-8") == text:
        return 0
    name = target.relative_to(ROOT) if target.is_relative_to(ROOT) else target
    print(f"{name} is not what {tool} makes; run it", file=sys.stderr)
    return 1
