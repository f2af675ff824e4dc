"""The tiny pair of models that real clusters serve here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.tiny_models import write_tiny_llama


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a target and of a drafter that agrees with it fairly often."""
    folder = tmp_path_factory.mktemp("pair")
    return write_tiny_llama(folder / "target"), write_tiny_llama(folder / "draft", noise=0.1)
