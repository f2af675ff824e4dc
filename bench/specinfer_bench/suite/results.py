"""The files that a run of the parts left, and how each went. Knows nothing of their contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from specinfer_bench.suite.running import DONE, PartResult

SUMMARY = "summary.json"
MAX_FILE_BYTES = 64 * 1024 * 1024
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """What is in a folder of results.

    Attributes:
        parts: how the last run of each part went, by its name.
        documents: the files of those that are done, by the part's name.
        digests: of those files' bytes.
    """

    parts: Mapping[str, PartResult] = field(default_factory=dict)
    documents: Mapping[str, Document] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The results in a folder; nothing when no run has left its summary there.

        Raises:
            OSError: when a part that is done has left no file.
            ValueError: when a file is not what a run leaves.
        """
        if not (folder / SUMMARY).is_file():
            return cls()
        parts = {
            name: PartResult(**facts)
            for name, facts in json.loads(_bytes(folder / SUMMARY))["parts"].items()
        }
        files = {
            name: _bytes(folder / f"{name}.json")
            for name, part in parts.items()
            if part.state == DONE
        }
        return cls(
            parts,
            documents={name: json.loads(body) for name, body in files.items()},
            digests={name: hashlib.sha256(body).hexdigest() for name, body in files.items()},
        )

    def named(self, prefix: str) -> dict[str, Document]:
        """The documents of parts whose names begin so."""
        return {name: each for name, each in self.documents.items() if name.startswith(prefix)}


def write_summary(folder: Path, found: Mapping[str, PartResult], order: Sequence[str]) -> None:
    """Write how the parts went, in an order of names.

    Those that were not run this time stay as they were, and those that `order` lacks are forgotten.
    """
    known = {**Results.read(folder).parts, **found}
    parts = {name: asdict(known[name]) for name in order if name in known}
    text = json.dumps({"parts": parts}, indent=2) + "\n"
    (folder / SUMMARY).write_text(text, encoding="utf-8")


def _bytes(path: Path) -> bytes:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path.name} is larger than 64 MiB")
    return path.read_bytes()
