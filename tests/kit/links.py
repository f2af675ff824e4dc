"""A link to a fake verify worker, for tests of links."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from specinfer.sampling import SamplingParams
from specinfer.tree import TokenTree
from specinfer_router.answer import Answer
from specinfer_router.links import LinkLimits
from specinfer_router.worker_links import VerifyLink
from tests.kit.fake_workers import FakeVerifier, info_of
from tests.kit.router import FAST_LINKS


def quiet() -> None:
    """A callback that does nothing."""


@asynccontextmanager
async def linked(
    limits: LinkLimits = FAST_LINKS, *, worker: FakeVerifier | None = None, **changes: Any
) -> AsyncIterator[tuple[FakeVerifier, VerifyLink]]:
    worker = worker or FakeVerifier(info_of("verify"), **changes)
    await worker.start()
    link = VerifyLink(worker.address, check=lambda info: None, on_ready=quiet, limits=limits)
    link.start()
    await link.attempted.wait()
    try:
        yield worker, link
    finally:
        await link.close()
        await worker.stop()


def open_on(link: VerifyLink, session_id: str, num_tokens: int = 3) -> Answer[None]:
    return link.open(session_id, 0, range(1, num_tokens + 1), num_tokens, SamplingParams(), None)


def step_on(link: VerifyLink, session_id: str, root: int = 3) -> Answer[Any]:
    return link.step(session_id, 0, TokenTree.root_only(root))
