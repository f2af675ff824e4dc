"""Reads what every Python installation says about itself: signatures, docstrings, short sources.

Works by importing a fixed list of standard modules and inspecting their public names, because
re-exports (``os.path.join``, ``math.sqrt``) have no Python source to parse under the name users
know. It refuses to know about chats, tokens and models.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data import topics
from types import ModuleType
from typing import Any

COMMON_MODULES = (
    "math cmath os os.path sys re json textwrap itertools functools collections pathlib random "
    "datetime time string shutil subprocess threading asyncio operator statistics heapq bisect "
    "copy csv io glob tempfile logging argparse contextlib dataclasses enum typing hashlib base64 "
    "pickle struct socket queue decimal fractions secrets uuid inspect types "
    "collections.abc urllib.parse concurrent.futures"
).split()
OTHER_MODULES = (
    "abc array ast atexit binascii calendar cmd code codecs colorsys  configparser "
    "copyreg ctypes curses.ascii difflib dis email.message errno  fileinput fnmatch "
    " gc getopt getpass gettext graphlib gzip hmac html html.parser http.client "
    "http.cookies http.server  importlib importlib.util ipaddress keyword linecache locale "
    "lzma  marshal mimetypes  multiprocessing  numbers pdb pkgutil platform "
    "  pprint profile pstats   reprlib resource runpy sched select "
    "selectors shelve shlex signal site  socketserver sqlite3 ssl stat   "
    "sysconfig tarfile timeit token tokenize trace traceback tracemalloc unicodedata unittest "
    "unittest.mock urllib.error urllib.request venv warnings  weakref webbrowser "
    "xml.etree.ElementTree   zipfile zlib zoneinfo bz2"
).split()
MAX_SUMMARY_CHARS = 330
MAX_SIGNATURE_CHARS = 110
MAX_SOURCE_LINES = 11
MAX_SOURCE_CHARS = 420
_STOP_LINE = re.compile(
    r"^\s*(>>>|\.\. |:\w+|Examples?\b.*:|Args:|Arguments:|Parameters\b|Returns:|Raises:|Usage:|"
    r"[-=*~^+|]{3,}|\s{2,}\w+\s*$)"
)


@dataclass(frozen=True)
class Item:
    """One documented thing: its public dotted name and what the interpreter says about it.

    ``kind`` is "function", "class", "method", "module", "exception" or "topic"; ``signature``
    starts with the name, or is empty when none is known; ``source`` is a short body or empty;
    ``members`` are the public names of a module; ``is_common`` marks the better known modules.
    """

    name: str
    kind: str
    signature: str
    summary: str
    source: str = ""
    members: tuple[str, ...] = ()
    is_common: bool = True


def clean_markup(text: str) -> str:
    """Drop reST roles, double backquotes and emphasis; collapse white space to single blanks."""
    text = re.sub(r":[a-zA-Z:]+:`~?([^`]*)`", r"\1", text)
    text = text.replace("``", "").replace("`", "'").replace("\\", "")
    text = re.sub(r"(?<!\*)\*(\w[^*\n]*?)\*(?!\*)", r"\1", text)
    return re.sub(r"\s+", " ", text).strip()


def first_sentences(text: str, max_chars: int = MAX_SUMMARY_CHARS) -> str:
    """The longest run of whole sentences from the start of ``text`` within ``max_chars``."""
    if len(text) <= max_chars:
        return text
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)", text) if match.end() <= max_chars]
    return text[: ends[-1]] if ends else ""


def summarise(doc: str, signature_name: str = "") -> str:
    """The first paragraphs of a docstring as clean prose, or "" when nothing readable is there."""
    kept: list[str] = []
    for index, line in enumerate(doc.strip().splitlines()):
        if _STOP_LINE.match(line):
            break
        if signature_name and line.strip().startswith(f"{signature_name}(") and index < 4:
            _, arrow, rest = line.partition(" -- ")
            line = rest if arrow else ""
        kept.append(line)
    paragraphs = [clean_markup(part) for part in re.split(r"\n\s*\n", "\n".join(kept))]
    text = ""
    for paragraph in filter(None, paragraphs):
        if text and text[-1] not in ".!?:":
            text += "."
        candidate = f"{text} {paragraph}".strip()
        if text and len(candidate) > MAX_SUMMARY_CHARS:
            break
        text = candidate
    text = first_sentences(text).rstrip(" :;,-")
    if len(text) < 12 or not any(char.islower() for char in text):
        return ""
    return text if text[-1] in ".!?" else f"{text}."


def read_signature(name: str, value: Any, *, drop_self: bool) -> str:
    """``name(parameters)`` without annotations, or "" when unknown; a long one ends in "..."."""
    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError):
        return ""
    empty = inspect.Parameter.empty
    parameters = [part.replace(annotation=empty) for part in signature.parameters.values()]
    if drop_self and parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    try:
        shown = str(signature.replace(parameters=parameters, return_annotation=empty))
    except ValueError:
        return ""
    shown = re.sub(r"<([\w.]+)[^<>]*>", r"\1", shown).replace(", /", "").replace("(/", "(")
    text = f"{name}{shown}"
    if len(text) > MAX_SIGNATURE_CHARS:
        text = f"{text[:MAX_SIGNATURE_CHARS].rpartition(', ')[0]}, ...)"
    return "" if " at 0x" in text else text


def read_source(value: Any) -> str:
    """The source of a short Python function without its docstring, or ""."""
    if not inspect.isfunction(value):
        return ""
    try:
        source = textwrap.dedent(inspect.getsource(value))
        node = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        return ""
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    if not node.body:
        return ""
    text = ast.unparse(node)
    is_short = len(text.splitlines()) <= MAX_SOURCE_LINES and len(text) <= MAX_SOURCE_CHARS
    return text if is_short else ""


def _kind_of(value: Any) -> str:
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    return "function"


def _read_member(name: str, value: Any, kind: str, is_common: bool) -> Item | None:
    doc = inspect.getdoc(value) if kind == "method" else getattr(value, "__doc__", None)
    if not isinstance(doc, str):
        return None
    summary = summarise(inspect.cleandoc(doc), name.rpartition(".")[2])
    if not summary:
        return None
    signature = "" if kind == "exception" else read_signature(name, value, drop_self=True)
    source = read_source(value) if kind == "function" else ""
    return Item(name, kind, signature, summary, source, (), is_common)


def _read_methods(prefix: str, owner: type, is_common: bool) -> Iterator[Item]:
    for attribute, raw in vars(owner).items():
        if attribute.startswith("_") or not callable(getattr(owner, attribute, None)):
            continue
        if inspect.isclass(raw) or not (getattr(raw, "__doc__", None) or ""):
            continue
        item = _read_member(f"{prefix}.{attribute}", getattr(owner, attribute), "method", is_common)
        if item is not None:
            yield item


def _public_names(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None)
    if names is not None:
        return [name for name in names if not name.startswith("_")]
    chosen: list[str] = []
    for name, value in vars(module).items():
        home = getattr(value, "__module__", None) or ""
        is_local = home.lstrip("_") in (module.__name__, "posix", "nt", "io", "builtins", "")
        is_local = is_local or home.split(".")[0].lstrip("_") == module.__name__.split(".")[0]
        if not name.startswith("_") and is_local and not inspect.ismodule(value):
            chosen.append(name)
    return chosen


def read_module(module_name: str, is_common: bool) -> Iterator[Item]:
    """Every documented public function, class and method of one importable module."""
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return
    prefix = "" if module is builtins else f"{module_name}."
    names = _public_names(module)
    summary = summarise(module.__doc__ or "", module_name)
    callables = tuple(n for n in names if callable(getattr(module, n, None)))
    if summary and prefix:
        yield Item(module_name, "module", "", summary, "", callables, is_common)
    classes: list[tuple[str, type]] = []
    for name in names:
        value = getattr(module, name, None)
        if not callable(value) or isinstance(value, ModuleType):
            continue
        item = _read_member(f"{prefix}{name}", value, _kind_of(value), is_common)
        if item is None:
            continue
        yield item
        if item.kind == "class" and isinstance(value, type):
            classes.append((f"{prefix}{name}", value))
    for name, owner in classes:
        yield from _read_methods(name, owner, is_common)


def read_topics() -> Iterator[Item]:
    """The language reference's short entries, keyed by keyword or topic."""
    for key, text in sorted(topics.topics.items()):
        body = re.sub(r"^.*\n\*{3,}\n", "", text.strip(), count=1)
        prose = [
            part
            for part in re.split(r"\n\s*\n", body)
            if not part.startswith("   ") and not re.search(r"::=|[=*-]{4,}", part)
        ]
        summary = summarise("\n\n".join(prose).replace('"', "'"))
        if summary:
            yield Item(key, "topic", "", summary)


def read_library(modules: tuple[str, ...] | None = None) -> list[Item]:
    """All items, first name wins, in a stable order.

    Args:
        modules: only these modules (for tests); by default builtins, the common and the other
            modules and the language topics.
    """
    chosen: list[tuple[str, bool]]
    if modules is None:
        chosen = [("builtins", True), *((name, True) for name in COMMON_MODULES)]
        chosen += [(name, False) for name in OTHER_MODULES]
    else:
        chosen = [(name, True) for name in modules]
    found: dict[tuple[str, str], Item] = {}
    seen_texts: set[tuple[str, str]] = set()
    for module_name, is_common in chosen:
        for item in read_module(module_name, is_common):
            key = (item.name, "module" if item.kind == "module" else "name")
            text_key = (item.name.rpartition(".")[2], item.summary)
            if key not in found and text_key not in seen_texts:
                found[key] = item
                seen_texts.add(text_key)
    if modules is None:
        for item in read_topics():
            found.setdefault((item.name, "topic"), item)
    return list(found.values())
