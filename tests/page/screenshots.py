"""Take the screenshots of the chat page for the documents, on a running cluster.

    .venv/bin/python tests/page/screenshots.py http://127.0.0.1:8000 docs/images

It knows the page's elements and nothing of the cluster.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import sys
from pathlib import Path

from playwright.async_api import Browser, Page, async_playwright

# Widths draw a tree in every round; by itself the cluster guesses where it pays.
SETTINGS = json.dumps({"widths": [3, 2, 1, 1], "seed": 7})
PHONE = """<body style="margin:0;display:flex;gap:24px;padding:24px;background:#ddd9cd">
<img src="{}" width="390" style="border-radius:24px"><img src="{}" width="390"
 style="border-radius:24px"></body>"""


async def opened(browser: Browser, address: str, scheme: str, width: int, height: int) -> Page:
    """The page of a profile of its own, ready."""
    context = await browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    await context.add_init_script(f"localStorage['specinfer.settings'] = {SETTINGS!r}")
    page = await context.new_page()
    await page.goto(address)
    await page.wait_for_selector("#model-state[data-state=ready]")
    return page


async def ask(page: Page, question: str) -> None:
    """Send a question and wait for the end of its answer."""
    await page.fill("#text", question)
    await page.press("#text", "Enter")
    await done(page)


async def done(page: Page) -> None:
    """Wait until nothing runs and the panel is drawn."""
    await page.wait_for_selector("#stop", state="hidden")
    await page.wait_for_selector(".turn.running", state="detached")
    await page.wait_for_selector("#tree svg", state="attached")


async def wide(browser: Browser, address: str, scheme: str, question: str, path: Path) -> None:
    """An answer, the same without speculation, and the panel."""
    page = await opened(browser, address, scheme, 1440, 960)
    await ask(page, question)
    await page.click("text=Run again without speculation")
    await done(page)
    await page.mouse.move(720, 20)
    await page.screenshot(path=path)


async def phone(browser: Browser, address: str, question: str, path: Path) -> None:
    """Both sides of the page on a phone, side by side."""
    page = await opened(browser, address, "light", 390, 800)
    await ask(page, question)
    sides = [await page.screenshot()]
    await page.click("#open-panel")
    await page.locator("#rounds").evaluate("element => element.scrollIntoView()")
    sides.append(await page.screenshot())
    images = [f"data:image/png;base64,{base64.b64encode(side).decode()}" for side in sides]
    both = await browser.new_page(viewport={"width": 852, "height": 848})
    await both.set_content(PHONE.format(*images))
    await both.screenshot(path=path)


async def main(address: str, folder: Path) -> None:
    """Take all of them."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        question = "What does textwrap.dedent do?"
        await wide(browser, address, "light", question, folder / "chat-light.png")
        question = "How do I use subprocess.run?"
        await wide(browser, address, "dark", question, folder / "chat-dark.png")
        await phone(browser, address, "Explain itertools.groupby.", folder / "chat-phone.png")
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
