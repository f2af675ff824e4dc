"""The entries of docs/runbook.md. This module knows nothing of alerts or dashboards."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_HEADING = re.compile(r"^### (.+)$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """One entry.

    Attributes:
        number: its place, from 1.
        title: its heading.
        text: what stands below it, Markdown.
    """

    number: int
    title: str
    text: str

    @property
    def anchor(self) -> str:
        """Where links to it go."""
        return self.title.lower()


def read_entries(path: Path) -> dict[str, Entry]:
    """The entries by title, in the file's order: what has a heading of the third level."""
    _, *parts = _HEADING.split(path.read_text(encoding="utf-8"))
    # A text ends where a heading of the second level begins.
    texts = [part.split("\n## ")[0].strip() for part in parts[1::2]]
    return {
        title: Entry(number, title, text)
        for number, (title, text) in enumerate(zip(parts[::2], texts, strict=True), start=1)
    }
