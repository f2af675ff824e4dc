"""Reads prompt files: JSON lines with a "prompt", or with "turns" of which the first is taken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specinfer.errors import InvalidRequest

MAX_PROMPT_FILE_BYTES = 64 * 1024 * 1024


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """The prompts of a file, at most `limit`; raises InvalidRequest naming the line at fault."""
    try:
        if path.stat().st_size > MAX_PROMPT_FILE_BYTES:
            raise InvalidRequest(f"{path} is larger than 64 MiB", field="prompts")
        # Not splitlines(): JSON strings may hold other line separators, such as U+2028.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {path}: {error}", field="prompts") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    prompts = [_prompt(path, number, line) for number, line in numbered[:limit]]
    if not prompts:
        raise InvalidRequest(f"{path} has no prompt", field="prompts")
    return prompts


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{path}:{number} is not JSON: {error}", field="prompts") from error
    prompt = _text(entry) if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise InvalidRequest(
            f'{path}:{number} needs a "prompt" with text or "turns", a list of texts',
            field="prompts",
        )
    return prompt


def _text(entry: Mapping[str, Any]) -> Any:
    """The prompt or the first turn; None when "turns" is anything but a list of strings."""
    prompt, turns = entry.get("prompt"), entry.get("turns")
    if prompt is not None:
        return prompt
    is_list = isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
    return turns[0] if is_list and turns else None
