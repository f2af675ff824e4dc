"""Write docs/settings.md, every setting of every process, from their classes; `--check` compares.

Flags, variables, types, defaults and texts are what the processes read at their start, so the page
cannot lag behind. It knows nothing of what the settings do.
"""

import dataclasses
import sys
import types
import typing
from pathlib import Path
from typing import Any

from specinfer_draft.settings import Settings as DraftSettings
from specinfer_router.settings import RouterSettings
from specinfer_verify.settings import Settings as VerifySettings
from tools.generated_file import write_or_check

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "settings.md"
PROCESSES = {
    "Router": ("SPECINFER_ROUTER", "python -m specinfer_router", RouterSettings),
    "Draft worker": ("SPECINFER_DRAFT", "python -m specinfer_draft", DraftSettings),
    "Verify worker": ("SPECINFER_VERIFY", "python -m specinfer_verify", VerifySettings),
}
HEAD = """# Every setting of the three processes

Made from the settings classes by `python tools/generate_settings.py`; do not edit it.

Each is a flag and a variable: `--kv-memory 512` and `SPECINFER_VERIFY_KV_MEMORY=512` say the same,
and the flag goes first. A flag that may be repeated is a variable with commas. A switch is turned
off by `--no-NAME` or the variable `false`. Names that end in `seconds` are seconds. Secrets are
given as files: a setting never holds one. One variable is no setting: with
`SPECINFER_NATIVE_KERNELS=off` a worker leaves its C++ kernels alone, to compare. What to choose is
in [operations.md](operations.md).
"""


def main() -> int:
    """Write the file, or with `--check` say whether it is what would be written."""
    return write_or_check(TARGET, reference(), "tools/generate_settings.py")


def reference() -> str:
    """The whole document."""
    parts = [HEAD]
    for title, (prefix, command, kind) in PROCESSES.items():
        parts += [f"\n## {title}: `{command}`\n\n", "| flag | variable | default | meaning |\n"]
        parts.append("|---|---|---|---|\n")
        hints = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            parts.append(_row(prefix, item, hints[item.name]))
    return "".join(parts)


def _row(prefix: str, item: "dataclasses.Field[Any]", hint: Any) -> str:
    flag = "--" + item.name.replace("_", "-")
    value = type_name(hint)
    cells = (
        f"`{flag}`" if value == "switch" else f"`{flag} {value.upper()}`",
        f"`{prefix}_{item.name.upper()}`",
        default_text(item),
        item.metadata["help"].replace("|", "\\|"),
    )
    return "| " + " | ".join(cells) + " |\n"


def type_name(hint: Any) -> str:
    """What a value looks like: text, number, path, switch, or one of them repeated."""
    arguments = [part for part in typing.get_args(hint) if part not in (types.NoneType, ...)]
    base = arguments[0] if arguments else hint
    return {str: "text", int: "integer", float: "number", bool: "switch", Path: "path"}[base]


def default_text(item: "dataclasses.Field[Any]") -> str:
    """A setting's default as a person writes it."""
    if item.default is dataclasses.MISSING:
        return "must be given"
    if item.default is None or item.default == "" or item.default == ():
        return ""
    if isinstance(item.default, bool):
        return "on" if item.default else "off"
    return f"`{item.default:g}`" if isinstance(item.default, float) else f"`{item.default}`"


if __name__ == "__main__":
    sys.exit(main())
