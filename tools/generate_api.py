"""Write docs/api.md, the reference of the SDK, from its docstrings; `--check` only compares.

Every public name of `specinfer` and `specinfer.testing` has to have a docstring and a place in
GROUPS. It knows nothing of what the names do.
"""

import ast
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from specinfer.errors import SpecinferError
from tools.generated_file import write_or_check

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "api.md"
GROUPS = {
    "Clients": ("specinfer.client", "specinfer.sync_client", "specinfer.stream"),
    "Conversations": ("specinfer.chat",),
    "Options": ("specinfer.options", "specinfer.retry", "specinfer.rpc", "specinfer.sampling"),
    "What comes back": ("specinfer.completion", "specinfer.messages", "specinfer.tree"),
    "Errors": ("specinfer.errors",),
}
TESTING = "Testing"
HEAD = """# The SDK's reference

Made from the docstrings by `python tools/generate_api.py`; do not edit it. How to use it all is in
[sdk.md](sdk.md).
"""
MAX_SIGNATURE = 80
SECTION = re.compile(r"^(Args|Attributes|Raises):$")
ENTRY = re.compile(r"^    (?P<name>\S[^:]*): (?P<text>.+)$")


def main() -> int:
    """Write the file, or with `--check` say whether it is what would be written."""
    return write_or_check(TARGET, reference(), "tools/generate_api.py")


def reference() -> str:
    """The whole document."""
    sections: dict[str, list[str]] = {title: [] for title in (*GROUPS, TESTING)}
    for package in ("specinfer", "specinfer.testing"):
        module = import_module(package)
        for name in sorted(module.__all__):
            if name == "__version__":
                continue
            value = getattr(module, name)
            title = TESTING if package == "specinfer.testing" else _group_of(name, value)
            sections[title].append("\n".join(_entry(name, value)))
    parts = (f"## {title}\n\n" + "\n".join(entries) for title, entries in sections.items())
    return HEAD + "\n" + "\n".join(parts).rstrip() + "\n"


def _group_of(name: str, value: Any) -> str:
    for title, modules in GROUPS.items():
        if value.__module__.startswith(modules):
            return title
    raise SystemExit(f"{name} of {value.__module__} has no group in {__file__}")


def _entry(name: str, value: Any) -> Iterator[str]:
    """One public name."""
    yield f"### {name}\n"
    if not inspect.isclass(value) and not inspect.isfunction(value):
        yield f"```python\n{name} = {_type_text(value)}\n```\n"
        return
    if inspect.isfunction(value):
        yield f"```python\n{name}{_signature(value)}\n```\n"
        yield _described(name, value)
        return
    if issubclass(value, SpecinferError):
        base = value.__base__.__name__ if value.__base__ else ""
        hint = "; the same call may succeed later" if value.retryable else ""
        yield f"A kind of `{base}`; travels as `{value.code}`{hint}.\n"
    elif not typing.is_typeddict(value) and _is_made_by_its_fields(value):
        yield f"```python\n{name}{_signature(value)}\n```\n"
    yield _described(name, value)
    if typing.is_typeddict(value):
        yield from _keys(value)
        return
    for member_name, member in vars(value).items():
        yield from _member(name, member_name, member)


def _is_made_by_its_fields(value: type) -> bool:
    if dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
        return True
    # Clients make streams: how is nobody's business.
    return "__init__" in vars(value) and not (value.__name__.endswith("Stream"))


def _member(owner: str, name: str, member: Any) -> Iterator[str]:
    if isinstance(member, classmethod):
        member = member.__func__
    if name == "__init__" and "\n" in (inspect.getdoc(member) or ""):
        yield _text(inspect.getdoc(member) or "")
        return
    if name.startswith("_") or name[0].isupper():
        return
    if isinstance(member, property):
        yield f"#### {owner}.{name}\n"
        yield _described(f"{owner}.{name}", member)
    elif inspect.isfunction(member):
        prefix = "async " if inspect.iscoroutinefunction(member) else ""
        yield f"#### {owner}.{name}\n"
        yield f"```python\n{prefix}{name}{_signature(member)}\n```\n"
        yield _described(f"{owner}.{name}", member)


def _keys(kind: type) -> Iterator[str]:
    """The keys of a TypedDict with the strings below them."""
    (node,) = (
        node for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef)
    )
    for item, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(below, ast.Expr):
            text = ast.literal_eval(below.value)
            yield f"- `{ast.unparse(item.target)}: {ast.unparse(item.annotation)}`: {text}"
    yield ""


def _signature(value: Any) -> str:
    """Parameters, without `self`, one a line where they are many."""
    signature = inspect.signature(value)
    given = signature.return_annotation
    result = "" if inspect.isclass(value) or given is inspect.Signature.empty else f" -> {given}"
    texts: list[str] = []
    for name, parameter in signature.parameters.items():
        if name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not any(t[0] == "*" for t in texts):
            texts.append("*")
        texts.append(_parameter(parameter))
    line = f"({', '.join(texts)}){result}"
    if len(line) <= MAX_SIGNATURE:
        return line
    return "(\n" + "".join(f"    {text},\n" for text in texts) + f"){result}"


def _parameter(parameter: inspect.Parameter) -> str:
    prefix = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
    annotated = f"{prefix}{parameter.name}: {_type_text(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return annotated
    default = repr(parameter.default).replace("<factory>", "...")
    return f"{annotated} = {default}"


def _type_text(value: Any) -> str:
    # A named tuple's annotations are wrapped.
    value = getattr(value, "__forward_arg__", value)
    text = value.__name__ if isinstance(value, type) else str(value)
    return re.sub(r"\b(?:specinfer|collections|typing)\.(?:\w+\.)*", "", text)


def _described(name: str, value: Any) -> str:
    text = inspect.getdoc(value)
    if not text:
        raise SystemExit(f"{name} has no docstring")
    return _text(text)


def _text(docstring: str) -> str:
    """A docstring as Markdown: its sections become lists."""
    lines: list[str] = []
    section = False
    for line in docstring.splitlines():
        if match := SECTION.match(line):
            section = True
            lines += [f"**{match[1]}**", ""]
        elif section and (match := ENTRY.match(line)):
            lines.append(f"- `{match['name']}`: {match['text']}")
        elif section and line.startswith("    "):
            lines.append(f"  {line.strip()}")
        else:
            section = section and not line
            lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
