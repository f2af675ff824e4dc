"""Measure the time from opening the chat page to its first token, on a running cluster.

    .venv/bin/python tests/page/first_token.py http://127.0.0.1:8000

Each run is a browser profile of its own, with nothing cached; the page sends its first message as
soon as it takes one. It knows the page's elements and nothing of the cluster.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import sys

from playwright.async_api import Browser, async_playwright

NUM_RUNS = 5
QUESTION = "What does textwrap.dedent do?"
# Runs in the page: sends when the field has taken the focus, and notes times since navigation.
SCRIPT = """
(question) => {
  const send = () => {
    const field = document.getElementById("text");
    if (document.activeElement !== field || !field) return requestAnimationFrame(send);
    window.sentAt = performance.now();
    field.value = question;
    field.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", cancelable: true }));
  };
  new MutationObserver((_, observer) => {
    if (!document.querySelector(".answer-text .token")) return;
    observer.disconnect();
    requestAnimationFrame(() => {
      window.shownAt = performance.now();
      document.documentElement.dataset.shown = "true";
    });
  }).observe(document, { childList: true, subtree: true });
  send();
}
"""


async def measure(browser: Browser, address: str) -> tuple[float, float]:
    """Milliseconds from navigation to sending, and to the first token on the screen."""
    context = await browser.new_context(viewport={"width": 1440, "height": 900})
    page = await context.new_page()
    await page.add_init_script(f"({SCRIPT})({QUESTION!r})")
    await page.goto(address, wait_until="commit")
    await page.wait_for_selector("html[data-shown]")
    sent, shown = await page.evaluate("[window.sentAt, window.shownAt]")
    await context.close()
    return sent, shown


async def main(address: str) -> None:
    """Measure and print every run and the medians."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        await measure(browser, address)  # starts the browser's own processes
        runs = [await measure(browser, address) for _ in range(NUM_RUNS)]
        await browser.close()
    for sent, shown in runs:
        print(f"sent after {sent:6.0f} ms, first token after {shown:6.0f} ms")
    sent, shown = (statistics.median(column) for column in zip(*runs, strict=True))
    print(f"median: sent after {sent:.0f} ms, first token after {shown:.0f} ms")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
