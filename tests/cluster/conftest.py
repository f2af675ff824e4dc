"""Real clusters of processes on tiny checkpoints, one for each kind that a module asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from specinfer_cli.cluster import ClusterSettings
from tests.kit.tiny_models import write_tiny_llama


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a target and of a drafter that agrees with it fairly often."""
    folder = tmp_path_factory.mktemp("pair")
    return (
        write_tiny_llama(folder / "target"),
        write_tiny_llama(folder / "draft", noise=0.1),
    )


@pytest.fixture(scope="session")
def tiny_settings(tiny_pair: tuple[Path, Path]) -> ClusterSettings:
    """A small cluster of them; change a copy with dataclasses.replace."""
    target, draft = tiny_pair
    return ClusterSettings(model=target, draft=draft, num_threads=1, grace_seconds=5.0)
