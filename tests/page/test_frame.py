"""The chat page in a real browser: history, hostile text, keys, errors, keyboard, phone, names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from playwright.async_api import Browser, BrowserContext, Page, expect

from tests.kit.page import ROUNDS, OpenPage, ScriptedModel, ended, round_of, send, text_of

pytestmark = pytest.mark.asyncio(loop_scope="session")

HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'
# WCAG 2.1's relative luminance and contrast, over the first opaque ground behind each element.
CONTRAST = """
element => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const pixel = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  let ground = element;
  while (ground && pixel(getComputedStyle(ground).backgroundColor)[3] < 255) {
    ground = ground.parentElement;
  }
  const [light, dark] = [
    luminance(pixel(getComputedStyle(element).color)),
    luminance(pixel(getComputedStyle(ground ?? document.body).backgroundColor)),
  ].sort((a, b) => b - a);
  return (light + 0.05) / (dark + 0.05);
}
"""
TEXTS = (
    "#model-name, #model-state, .who, .said, .token, .facts span, .actions .button, .faint, "
    "#history-list .title, .numbers dt, .numbers dd, .story, .parts li, .depths td, .ratio, "
    ".switch-text, .segments span, #new-chat, #send"
)


async def test_history_survives_a_reload_with_its_tint(page: Page, model: ScriptedModel) -> None:
    await send(page, "First question")
    await page.locator("#new-chat").click()
    await expect(page.locator("#welcome")).to_be_visible()
    await send(page, "Second question")
    await page.reload()
    titles = page.locator("#history-list .title")
    assert await titles.all_inner_texts() == ["Second question", "First question"]
    assert await page.locator(".said").all_inner_texts() == ["Second question"]
    assert await page.locator(".answer-text").text_content() == text_of(ROUNDS)
    accepted = await page.locator(".answer-text .token.accepted").all_text_contents()
    assert accepted == ["The function wraps", " and returns"]
    await expect(page.locator("#per-round")).to_have_text("2.67")
    await expect(page.locator("#rounds-gone")).to_be_visible()
    await titles.last.click()
    assert await page.locator(".said").all_inner_texts() == ["First question"]
    await send(page, "And then?")
    assert [turn["role"] for turn in model.bodies[-1]["messages"]] == ["user", "assistant", "user"]


async def test_two_tabs_share_one_history(page: Page, model: ScriptedModel) -> None:
    other = OpenPage(await page.context.new_page(), model.address)
    await other.visit()
    await send(page, "From one tab")
    await expect(other.page.locator("#history-list .title")).to_have_count(1)
    await send(other.page, "From the other")
    titles = ["From one tab", "From the other"]
    for tab in (page, other.page):
        await expect(tab.locator("#history-list .title")).to_have_count(2)
        assert sorted(await tab.locator("#history-list .title").all_inner_texts()) == titles
    other.check()
    await other.page.close()


async def test_conversations_are_renamed_and_deleted(page: Page) -> None:
    await send(page, "A question")
    await page.get_by_role("button", name="Rename A question").click()
    await page.locator("#ask-field").fill("Another name")
    await page.keyboard.press("Enter")
    assert await page.locator("#history-list .title").all_inner_texts() == ["Another name"]
    await page.get_by_role("button", name="Delete Another name").click()
    await page.keyboard.press("Escape")
    await expect(page.locator("#history-list .title")).to_have_count(1)
    await page.get_by_role("button", name="Delete Another name").click()
    await page.locator("#ask-yes").click()
    await expect(page.locator("#history-list .title")).to_have_count(0)
    await expect(page.locator("#welcome")).to_be_visible()


async def test_the_page_works_where_the_browser_keeps_nothing(
    context: BrowserContext, model: ScriptedModel
) -> None:
    refuse = 'Object.defineProperty(window, "{}", {{ get() {{ throw new Error("off"); }} }});'
    for name in ("localStorage", "sessionStorage"):
        await context.add_init_script(refuse.format(name))
    opened = OpenPage(await context.new_page(), model.address)
    await opened.visit()
    await expect(opened.page.locator("#history-note")).to_be_visible()
    await send(opened.page, "Hi")
    assert await opened.page.locator(".answer-text").text_content() == text_of(ROUNDS)
    opened.check()


async def test_odd_things_in_storage_break_nothing(page: Page, model: ScriptedModel) -> None:
    odd: list[Any] = [3, None, {"id": "x", "messages": [{"role": "assistant", "content": "kept"}]}]
    odd[2]["messages"] += [{"role": "assistant", "content": "y", "facts": {"rounds": 3}}, 5]
    await page.evaluate(
        "odd => { localStorage['specinfer.conversations'] = odd;"
        " localStorage['specinfer.current'] = '\"x\"';"
        ' localStorage[\'specinfer.settings\'] = \'{"temperature": "hot", "stop": 3}\'; }',
        json.dumps(odd),
    )
    await page.reload()
    assert await page.locator(".answer-text").all_text_contents() == ["kept", "y"]
    await send(page, "Hi")
    assert model.bodies[-1]["temperature"] == 0.7


async def test_what_a_model_writes_is_text(page: Page, model: ScriptedModel) -> None:
    model.rounds = [round_of([HOSTILE], " ok", [HOSTILE])]
    await send(page, HOSTILE)
    assert await page.locator(".answer-text").text_content() == f"{HOSTILE} ok"
    assert await page.locator(".said").text_content() == HOSTILE
    await expect(page.locator("#turns img, #turns script, #tree img, nav img")).to_have_count(0)
    assert await page.evaluate("window.hit") is None


async def test_markdown_shapes_the_text_and_loses_none(page: Page, model: ScriptedModel) -> None:
    words = [
        "Use ",
        "`a",
        "b`",
        " and **b",
        "old**.\n\n",
        "```py",
        "\nx = `1`\n",
        "``",
        "`\n",
        "End",
    ]
    model.rounds = [round_of(words[:5], words[5]), round_of(words[6:9], words[9])]
    await send(page, "Hi")
    assert await page.locator(".answer-text").text_content() == "".join(words)
    await expect(page.locator(".answer-text .paragraph code")).to_have_text("ab")
    await expect(page.locator(".answer-text strong")).to_have_text("bold")
    assert await page.locator(".answer-text pre .line.code").all_text_contents() == ["x = `1`\n"]
    await expect(page.locator(".answer-text pre .token.accepted")).not_to_have_count(0)


async def test_a_key_is_asked_for_and_kept_with_the_tab_alone(
    context: BrowserContext, model: ScriptedModel
) -> None:
    model.key = "right"
    opened = OpenPage(await context.new_page(), model.address)
    page = opened.page
    await page.goto(model.address)
    await expect(page.locator("#model-state")).to_have_text("needs an API key")
    await send(page, "Hi")
    await page.get_by_label("API key").fill("right")
    await page.get_by_role("button", name="Use this key").click()
    await expect(page.locator(".answer-text")).to_have_text(text_of(ROUNDS))
    await expect(page.locator("#model-state")).to_have_text("ready")
    assert await page.evaluate("JSON.stringify(localStorage).includes('right')") is False
    assert await page.evaluate("sessionStorage.getItem('specinfer.key')") == "right"
    opened.check()


async def test_a_refused_request_says_what_to_change(page: Page, model: ScriptedModel) -> None:
    error = {"message": "max_tokens is too large.", "param": "max_tokens", "code": "invalid"}
    model.refusals = [(400, {"error": error}, {})]
    await send(page, "Hi")
    alert = page.get_by_role("alert").filter(has_text="refused")
    await expect(alert).to_contain_text("max_tokens is too large. Change max_tokens")


async def test_the_state_follows_the_server(page: Page, model: ScriptedModel) -> None:
    model.ready = False
    await page.reload()
    await expect(page.locator("#model-state")).to_have_text("no verify worker is ready")
    model.ready = True
    await expect(page.locator("#model-state")).to_have_text("ready")


async def test_settings_are_checked_kept_and_sent(page: Page, model: ScriptedModel) -> None:
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_label("Temperature").fill("9")
    await page.get_by_role("button", name="Save").click()
    await expect(page.locator("#settings-problem")).to_contain_text("from 0 to 2")
    await page.get_by_label("Temperature").fill("0")
    await page.get_by_label("Seed").fill("7")
    await page.get_by_label("System message").fill("Be brief.")
    await page.get_by_label("Stop at").fill("END")
    await page.get_by_label("Tree widths").fill("3, 2")
    await page.get_by_role("button", name="Save").click()
    await page.reload()
    await send(page, "Hi")
    body = model.bodies[-1]
    assert (body["temperature"], body["seed"], body["stop"]) == (0, 7, ["END"])
    assert body["speculation"]["widths"] == [3, 2]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


async def test_everything_can_be_done_from_the_keyboard(page: Page, model: ScriptedModel) -> None:
    await expect(page.locator("#text")).to_be_focused()
    await page.keyboard.type("One")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("two")
    await page.keyboard.press("Enter")
    await ended(page)
    assert model.bodies[0]["messages"][0]["content"] == "One\ntwo"
    await expect(page.locator("#round-title")).to_have_text("Round 1 of 3")
    reached = set()
    for _ in range(60):
        await page.keyboard.press("Tab")
        reached.add(await page.evaluate(NAME_OF_FOCUS))
    wanted = {"Copy", "Regenerate", "Run again without speculation", "Settings", "Send", "Theme"}
    wanted |= {
        "Round to look at",
        "Previous round",
        "Next round",
        "Conversations",
        "New conversation",
    }
    assert not {name for name in wanted if not any(seen.startswith(name) for seen in reached)}
    await page.keyboard.press("Alt+/")
    await expect(page.locator("#keys")).to_be_visible()
    await page.keyboard.press("Escape")
    await page.keyboard.press("Alt+p")
    await expect(page.locator("#panel")).to_be_hidden()
    await page.keyboard.press("Alt+n")
    await expect(page.locator("#welcome")).to_be_visible()


NAME_OF_FOCUS = (
    "(document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText)"
)


async def test_the_finished_answer_is_announced_once(page: Page) -> None:
    await page.evaluate(
        "window.said = []; new MutationObserver(() => window.said.push("
        "document.getElementById('announcer').textContent))"
        ".observe(document.getElementById('announcer'), { childList: true })"
    )
    await send(page, "Hi")
    assert await page.evaluate("window.said") == [f"Answer: {text_of(ROUNDS)}"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_text_stands_out_from_its_ground(page: Page, scheme: str) -> None:
    await page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    await send(page, "Hi")
    await expect(page.locator("#num-tokens")).to_have_text("8")
    ratios = await page.locator(TEXTS).evaluate_all(
        "elements => elements.filter(e => e.checkVisibility())"
        f".map(e => [({CONTRAST.strip()})(e), e.outerHTML])"
    )
    assert len(ratios) > 40
    assert not [(ratio, html) for ratio, html in ratios if ratio < 4.5]


async def test_controls_have_names(page: Page) -> None:
    await send(page, "Hi")
    unnamed = await page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea")]
          .filter(e => !(e.getAttribute("aria-label") || e.innerText?.trim() || e.textContent.trim()
            || e.labels?.[0]?.textContent.trim()))
          .map(e => e.outerHTML)"""
    )
    assert unnamed == []
    roles = ["banner", "navigation", "main", "complementary"]
    for role in roles:
        await expect(page.get_by_role(role)).to_have_count(1)  # type: ignore[arg-type]


async def test_the_theme_is_remembered(page: Page) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = await page.evaluate(ground)
    await page.locator("#theme").click()
    await page.locator("#theme").click()
    dark = await page.evaluate(ground)
    assert dark != light
    await page.reload()
    assert await page.evaluate(ground) == dark


@pytest.mark.parametrize("width", [320, 390, 430])
async def test_a_phone_needs_no_sideways_scrolling(
    browser: Browser, model: ScriptedModel, width: int
) -> None:
    context = await browser.new_context(
        viewport={"width": width, "height": 740}, has_touch=True, reduced_motion="reduce"
    )
    opened = OpenPage(await context.new_page(), model.address)
    page = opened.page
    await opened.visit()
    overflow = "document.documentElement.scrollWidth > innerWidth"
    assert not await page.evaluate(overflow)
    model.rounds = [round_of(["word" * 30, " and"], " `" + "x" * 200 + "`", ["y" * 40] * 9)]
    await send(page, "a" * 200)
    assert not await page.evaluate(overflow)
    scroller = "document.getElementById('scroller')"
    assert await page.evaluate(f"{scroller}.scrollWidth <= {scroller}.clientWidth")
    await expect(page.locator("#panel")).to_be_hidden()
    await page.locator("#open-panel").click()
    await expect(page.locator("#tree .node.tail")).to_be_visible()
    assert await page.evaluate("document.getElementById('chat').inert")
    panel = "document.getElementById('panel')"
    assert await page.evaluate(f"{panel}.scrollWidth <= {panel}.clientWidth")
    await page.keyboard.press("Escape")
    await expect(page.locator("#panel")).to_be_hidden()
    await expect(page.locator("#open-panel")).to_be_focused()
    opened.check()
    await context.close()


async def test_a_long_fast_answer_keeps_up_and_bounds_its_elements(
    page: Page, model: ScriptedModel
) -> None:
    line = [" word" for _ in range(40)]
    model.rounds = [round_of(line, "\n") for _ in range(300)]
    await page.evaluate(
        "window.longest = 0; new PerformanceObserver(list => { for (const e of list.getEntries())"
        " window.longest = Math.max(window.longest, e.duration); }).observe({type: 'longtask'})"
    )
    await send(page, "Hi")
    assert await page.locator(".answer-text").text_content() == text_of(model.rounds)
    assert await page.locator(".token").count() < 7500
    # 12,000 tokens at once: no frame may have stood still for long.
    assert await page.evaluate("window.longest") < 1000
