"""The chat page over the real HTTP API and router, whole and over links that break."""

from __future__ import annotations

import pytest
from playwright.async_api import BrowserContext, expect

from specinfer_router.gateway.app import api_routes
from specinfer_router.gateway.operator import operator_routes
from specinfer_router.gateway.page import page_routes
from specinfer_router.gateway.server import Gateway
from tests.kit.gateway import saying
from tests.kit.link_breaker import LinkBreaker
from tests.kit.page import OpenPage, send
from tests.kit.router import running_router

pytestmark = pytest.mark.asyncio(loop_scope="session")

SAID = "A naïve café 🙂 holds `x = 1`, **bold** words\n\n```py\nprint(1)\n```\n" * 3 + "and ends."
# Bytes of an answer's events after which its connection is cut.
CUTS = (700, 3000, 9000)


async def test_text_is_whole_over_the_real_api_and_over_links_that_break(
    context: BrowserContext,
) -> None:
    async with running_router(verifiers=[saying(SAID)]) as bench:
        pages = [
            *page_routes(),
            *operator_routes(lambda: bench.router.not_ready_reason, bench.registry),
        ]
        gateway = Gateway("127.0.0.1:0", api_routes(lambda: bench.router), open_routes=pages)
        await gateway.start()
        breaker = LinkBreaker(f"127.0.0.1:{gateway.port}")
        await breaker.start()
        opened = OpenPage(await context.new_page(), f"http://{breaker.address}")
        await opened.visit()
        page = opened.page
        await expect(page.locator("#model-name")).to_have_text("table")
        for num_answers, cut in enumerate((None, *CUTS), start=1):
            await page.locator("#new-chat").click()
            breaker.cut_after(cut)
            await send(page, "words")
            assert await page.locator(".answer-text").text_content() == SAID, cut
            assert breaker.num_cut == num_answers - 1
        await expect(page.locator(".token.own")).not_to_have_count(0)
        opened.check()
        await context.close()
        await breaker.stop()
        await gateway.stop()
