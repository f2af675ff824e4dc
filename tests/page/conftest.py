"""A browser, and the chat page served by the real HTTP server in front of a scripted model.

Everything runs on one event loop that lives as long as the session.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Error, Page, async_playwright

from specinfer_router.gateway.page import page_routes
from specinfer_router.gateway.server import Gateway
from tests.kit.page import OpenPage, ScriptedModel

_ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
_PATIENCE_MS = 15_000


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Chromium from the PATH, or else Playwright's own; skips where there is neither."""
    async with async_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            launched = await playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        except Error as error:
            if os.environ.get("CI"):
                pytest.fail(f"no browser, and CI must have one: {error.message}")
            pytest.skip(f"no Chromium to open the page with: {error.message.splitlines()[0]}")
        yield launched
        await launched.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def served_model() -> AsyncIterator[ScriptedModel]:
    """The scripted model, served beside the page on a free port."""
    scripted = ScriptedModel()
    gateway = Gateway("127.0.0.1:0", scripted.routes(), open_routes=page_routes())
    await gateway.start()
    scripted.address = f"http://127.0.0.1:{gateway.port}"
    yield scripted
    await gateway.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def model(served_model: ScriptedModel) -> AsyncIterator[ScriptedModel]:
    """The scripted model as it is when nobody has told it anything."""
    served_model.reset()
    yield served_model
    served_model.release()


async def new_context(browser: Browser) -> BrowserContext:
    """A browser profile of its own, wide, in light colours, without motion."""
    context = await browser.new_context(
        viewport={"width": 1440, "height": 900}, color_scheme="light", reduced_motion="reduce"
    )
    context.set_default_timeout(_PATIENCE_MS)
    return context


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_context(browser: Browser) -> AsyncIterator[BrowserContext]:
    """The profile of all tests that change nothing about it; its cache saves them time."""
    context = await new_context(browser)
    yield context
    await context.close()


@pytest_asyncio.fixture(loop_scope="session")
async def context(browser: Browser) -> AsyncIterator[BrowserContext]:
    """A profile for one test."""
    context = await new_context(browser)
    yield context
    await context.close()


@pytest_asyncio.fixture(loop_scope="session")
async def page(shared_context: BrowserContext, model: ScriptedModel) -> AsyncIterator[Page]:
    """The page, ready; fails afterwards for errors on its console or calls to other origins."""
    opened = OpenPage(await shared_context.new_page(), model.address)
    await opened.visit()
    yield opened.page
    await opened.page.evaluate("localStorage.clear()")
    await opened.page.close()
    opened.check()
