"""Where the model folders and the demo questions are, and what to tell who has none.

This module knows nothing of what is in the folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import specinfer
from specinfer.errors import InvalidRequest

NO_DRAFT = "none"
DEMO_NAME = "demo"


def demo_folder() -> Path:
    """The demo pair beside this source tree, else below the current folder.

    Raises:
        InvalidRequest: when there is none, with what to do instead.
    """
    beside = Path(specinfer.__file__).resolve().parent.parent / "models" / "demo"
    below = Path.cwd() / "models" / "demo"
    for folder in (beside, below):
        if (folder / "target").is_dir():
            return folder
    raise InvalidRequest(
        f"the demo pair is not in {beside}; give a target model with --model FOLDER "
        "(and a drafter with --draft FOLDER), or work in a clone of the repository",
        field="model",
    )


@dataclass(frozen=True)
class ModelChoice:
    """Which models a local cluster serves.

    Attributes:
        name: what clients call the target.
        target: its folder.
        draft: the drafter's folder, or None.
    """

    name: str
    target: Path
    draft: Path | None


def choose_models(model: Path | None, draft: str | None) -> ModelChoice:
    """The target and the drafter, from the flags --model and --draft.

    The demo drafter is the default beside the demo target alone: any other target has another
    tokenizer.

    Raises:
        InvalidRequest: when a folder does not exist.
    """
    target = _folder("--model", model) if model is not None else demo_folder() / "target"
    name = target.name if model is not None else DEMO_NAME
    if draft == NO_DRAFT:
        return ModelChoice(name, target, None)
    if draft is not None:
        return ModelChoice(name, target, _folder("--draft", Path(draft)))
    return ModelChoice(name, target, demo_folder() / "draft" if model is None else None)


def prompt_file(given: Path | None) -> Path:
    """The prompt file itself, or the demo questions; raises InvalidRequest when there are none."""
    if given is not None:
        return given
    questions = demo_folder() / "prompts.jsonl"
    if not questions.is_file():
        raise InvalidRequest(f"{questions} is missing; give --prompts FILE", field="prompts")
    return questions


def _folder(flag: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise InvalidRequest(f"{flag}: {folder} is not a folder", field=flag.lstrip("-"))
    return folder.resolve()
