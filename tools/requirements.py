"""Print what extras of pyproject.toml need, one requirement a line: `requirements.py router cli`.

An image installs these before our sources are copied, so that an edit does not install them again.
It knows nothing of what the packages are for.
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWN = re.compile(r"^specinfer\[(?P<extras>[^]]+)\]$")


def requirements(project: Mapping[str, object], extras: Sequence[str]) -> Iterator[str]:
    """The project's own needs and those of `extras`, extras within extras resolved."""
    optional = project["optional-dependencies"]
    assert isinstance(optional, dict)
    base = project["dependencies"]
    assert isinstance(base, list)
    yield from base
    waiting = list(extras)
    while waiting:
        for line in optional[waiting.pop(0)]:
            own = OWN.match(line)
            if own:
                waiting += [name.strip() for name in own["extras"].split(",")]
            else:
                yield line


def main() -> int:
    """Print them, each once."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    print("\n".join(dict.fromkeys(requirements(project, sys.argv[1:]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
