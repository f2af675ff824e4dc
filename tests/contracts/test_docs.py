"""What the documents promise exists: links, make targets, the two commands on the first screen."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "*/README.md", "*/*/README.md", "docs/*.md")
    for path in ROOT.glob(pattern)
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
MAX_TARGETS = 16
FIRST_SCREEN_LINES = 45
TREE_LINE = re.compile(r"^(?P<indent>(?:│? {3})*)[├└]── (?P<name>\S+)")


def make_targets() -> dict[str, str]:
    """Each documented target of the Makefile with its help text."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z-]+):.*?## (.+)$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_local_links_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    local = [target for target in targets if "://" not in target]
    missing = [target for target in local if not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_exist(document: Path) -> None:
    named = set(re.findall(r"`make ([a-z-]+)", document.read_text(encoding="utf-8")))
    assert named <= set(make_targets())


def test_makefile_is_short_and_says_what_each_target_does() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text, flags=re.MULTILINE)
    assert set(phony.split()) == set(make_targets())
    assert len(make_targets()) <= MAX_TARGETS


def test_first_screen_of_the_readme_has_the_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:FIRST_SCREEN_LINES]
    for command in ("make up", "make test", 'specinfer generate "What does textwrap.dedent do?"'):
        assert any(command in line for line in lines), command


def test_file_tree_of_the_readme_exists() -> None:
    folders: list[str] = []
    missing = []
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if match := TREE_LINE.match(line):
            depth = len(match["indent"]) // 4
            folders = [*folders[:depth], match["name"].rstrip("/")]
            if not (ROOT / Path(*folders)).exists():
                missing.append("/".join(folders))
    assert folders, "the README has no file tree"
    assert not missing


def test_every_constraint_is_an_exact_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==(\d+!)?[A-Za-z0-9.]+", pin) for pin in pins)


def test_every_direct_dependency_is_constrained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(item for extra in extras for item in extra)]
    # A CUDA build of torch demands exactly its own Triton, which a pin of ours would contradict.
    unpinned = {"specinfer", "triton"}
    names = {re.split(r"[^A-Za-z0-9._-]", item)[0] for item in wanted} - unpinned
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    }
    assert {name.lower().replace("_", "-") for name in names} <= pinned
