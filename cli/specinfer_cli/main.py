"""Where the `specinfer` command begins; says what to install when its libraries are missing."""

from __future__ import annotations

import importlib
import sys

_LIBRARIES = frozenset({"typer", "rich", "click"})


def main() -> None:
    """Run the command line of this process; ends it with the command's status."""
    try:
        app = importlib.import_module("specinfer_cli.app").app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _LIBRARIES:
            raise
        print(
            f"specinfer: the command line needs {error.name}: pip install 'specinfer[cli]'",
            file=sys.stderr,
        )
        sys.exit(1)
    app(prog_name="specinfer")


if __name__ == "__main__":
    main()
