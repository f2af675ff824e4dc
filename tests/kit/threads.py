"""Fewer compute threads for a test. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small cases wait for threads longer than they compute, above all on a busy machine.

    A test file that imports this fixture has it for all of its tests.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
