"""The chat page in a real browser: sending, tint, the tree, stopping, comparing, resuming."""

from __future__ import annotations

import asyncio

import pytest
from playwright.async_api import Page, expect

from tests.kit.page import ROUNDS, ScriptedModel, ended, round_of, send, text_of

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_an_answer_streams_in_and_is_the_text_that_was_sent(
    page: Page, model: ScriptedModel
) -> None:
    await send(page, "What wraps text?")
    assert await page.locator(".answer-text").text_content() == text_of(ROUNDS)
    body = model.bodies[0]
    assert body["messages"] == [{"role": "user", "content": "What wraps text?"}]
    assert body["speculation"] == {"enabled": True, "detail": True}
    assert body["stream"] is True
    assert isinstance(body["seed"], int)


async def test_tokens_are_tinted_by_how_they_came(page: Page) -> None:
    await send(page, "Hi")
    assert await page.locator(".answer-text .token.accepted").all_text_contents() == [
        "The", " function", " wraps", " and", " returns",
    ]  # fmt: skip
    assert await page.locator(".answer-text .token.own").all_text_contents() == [
        " text", " lines", ".",
    ]  # fmt: skip
    style = "element => getComputedStyle(element).textDecorationLine"
    own = page.locator(".token.own").last
    assert await own.evaluate(style) == "underline"
    await page.locator("label", has_text="Tint").click()
    assert await own.evaluate(style) == "none"


async def test_text_is_kept_where_tokens_hold_halves_of_characters(
    page: Page, model: ScriptedModel
) -> None:
    model.rounds = [round_of(["na", "\ufffd"], "\ufffd"), round_of(["ve"], "!"), round_of([], "")]
    model.contents = ["na", "ïve", "!"]
    await send(page, "Hi")
    assert await page.locator(".answer-text").text_content() == "naïve!"


async def test_the_panel_draws_the_tree_and_steps_through_rounds(page: Page) -> None:
    await send(page, "Hi")
    # At rest it shows the round that kept most.
    await expect(page.locator("#round-title")).to_have_text("Round 1 of 3")
    nodes = page.locator("#tree .node")
    assert await page.locator("#tree .node.accepted text").all_text_contents() == [
        "The", "·function", "·wraps",
    ]  # fmt: skip
    await expect(page.locator("#tree .node.rejected")).to_have_count(2)
    await expect(page.locator("#tree .node.tail text")).to_have_text("·text")
    await expect(page.locator("#tree .edge")).to_have_count(await nodes.count() - 1)
    await page.locator("#scrubber").press("ArrowRight")
    await expect(page.locator("#round-title")).to_have_text("Round 2 of 3")
    await expect(page.locator("#tree .node.tail text")).to_have_text("·lines")
    await page.locator("#round-next").click()
    await expect(page.locator("#round-story")).to_contain_text("No guesses")
    await page.locator(".token", has_text=" returns").click()
    await expect(page.locator("#round-title")).to_have_text("Round 2 of 3")


async def test_the_panel_counts_what_was_kept(page: Page) -> None:
    await send(page, "Hi")
    await expect(page.locator("#per-round")).to_have_text("2.67")
    await expect(page.locator("#kept-rate")).to_have_text("63 %")
    rows = page.locator("#depths tr")
    texts = [(await row.inner_text()).split() for row in await rows.all()]
    assert [(row[0], row[-1]) for row in texts] == [("1", "2/2"), ("2", "2/2"), ("3", "1/1")]
    # The router's own measure stands in until the user has one.
    await expect(page.locator("#plain-source")).to_contain_text("measured by the router")
    await expect(page.locator("#speeds")).to_contain_text("50.0 tokens/s")


async def test_speculation_off_goes_into_the_request_and_measures_plain_decoding(
    page: Page, model: ScriptedModel
) -> None:
    await page.locator("#text").press("Alt+s")
    await expect(page.locator("#speculate-state")).to_have_text("off")
    await send(page, "Hi")
    assert model.bodies[0]["speculation"]["enabled"] is False
    await expect(page.locator(".answer-text .token.accepted")).to_have_count(0)
    await expect(page.locator(".answer-text .token.own")).to_have_count(8)
    await page.locator("#text").press("Alt+s")
    await send(page, "Hi")
    await expect(page.locator("#plain-source")).to_contain_text("measured on your messages")


async def test_running_again_without_speculation_shows_that_the_text_is_the_same(
    page: Page, model: ScriptedModel
) -> None:
    await send(page, "Hi")
    await page.get_by_role("button", name="Run again without speculation").click()
    await ended(page)
    first, second = model.bodies
    assert second == {**first, "speculation": {"enabled": False, "detail": True}}
    verdict = page.locator(".verdict")
    await expect(verdict).to_contain_text(f"Identical: all {len(text_of(ROUNDS))} characters")
    assert await page.locator(".twin .answer-text").text_content() == text_of(ROUNDS)


async def test_a_different_text_is_not_called_identical(page: Page, model: ScriptedModel) -> None:
    await send(page, "Hi")
    model.rounds = [*ROUNDS[:-1], round_of([], "!")]
    await page.get_by_role("button", name="Run again without speculation").click()
    await ended(page)
    at = len(text_of(ROUNDS))
    await expect(page.locator(".verdict")).to_contain_text(f"Different from character {at} on")
    assert await page.locator(".verdict").get_attribute("data-same") == "false"


async def test_stopping_closes_the_stream_and_keeps_what_came(
    page: Page, model: ScriptedModel
) -> None:
    model.hold_after = 4
    await page.locator("#text").fill("Hi")
    await page.locator("#text").press("Enter")
    await expect(page.locator(".answer-text")).to_have_text(text_of(ROUNDS[:1]))
    await page.locator("#text").press("Escape")
    await ended(page)
    await asyncio.wait_for(model.left.wait(), 10)
    await expect(page.locator(".facts")).to_contain_text("stopped")
    assert await page.locator(".answer-text").text_content() == text_of(ROUNDS[:1])


async def test_leaving_a_conversation_stops_its_answer_and_keeps_what_came(
    page: Page, model: ScriptedModel
) -> None:
    model.hold_after = 4
    await page.locator("#text").fill("First")
    await page.locator("#text").press("Enter")
    await expect(page.locator(".answer-text")).to_have_text(text_of(ROUNDS[:1]))
    await page.locator("#new-chat").click()
    await asyncio.wait_for(model.left.wait(), 10)
    await ended(page)
    model.hold_after = None
    await send(page, "Second")
    assert await page.locator(".answer-text").all_text_contents() == [text_of(ROUNDS)]
    await page.locator("#history-list .title", has_text="First").click()
    assert await page.locator(".answer-text").all_text_contents() == [text_of(ROUNDS[:1])]


async def test_a_broken_stream_goes_on_where_it_was(page: Page, model: ScriptedModel) -> None:
    model.cuts = [4, 7]
    await page.locator("#text").fill("Hi")
    await page.locator("#text").press("Enter")
    for num_rounds in (1, 2):
        await expect(page.locator(".answer-text")).to_have_text(text_of(ROUNDS[:num_rounds]))
        model.cut()
    await ended(page)
    assert await page.locator(".answer-text").text_content() == text_of(ROUNDS)
    (first, _), (second, headers), (third, last) = model.calls
    assert first == second == third
    assert headers["last-event-id"] == "session:4"
    assert last["last-event-id"] == "session:7"
    await expect(page.locator(".answer-text .token")).to_have_count(8)
    await expect(page.locator(".notice")).to_be_hidden()


async def test_a_stream_that_stays_broken_says_so_and_goes_on_by_hand(
    page: Page, model: ScriptedModel
) -> None:
    refusal = {"error": {"message": "No worker.", "code": "unavailable"}}
    model.failure = (4, {"message": "The worker broke for good.", "code": "internal"})
    await send(page, "Hi")
    await expect(page.locator(".notice")).to_contain_text("The worker broke for good.")
    assert await page.locator(".answer-text").text_content() == text_of(ROUNDS[:1])
    model.refusals = [(503, refusal, {"retry-after-ms": "2000"})]
    await page.get_by_role("button", name="Try again").click()
    await expect(page.locator(".notice")).to_contain_text("Try again in 2 seconds")
    await page.get_by_role("button", name="Try again").click()
    await ended(page)
    assert await page.locator(".answer-text").text_content() == text_of(ROUNDS)


async def test_a_resumable_error_in_mid_stream_is_resumed(page: Page, model: ScriptedModel) -> None:
    model.failure = (4, {"message": "Read too slowly.", "code": "reader_stalled"})
    await send(page, "Hi")
    assert await page.locator(".answer-text").text_content() == text_of(ROUNDS)
    assert model.calls[1][1]["last-event-id"] == "session:4"


async def test_a_model_without_a_chat_template_continues_texts(
    page: Page, model: ScriptedModel
) -> None:
    model.chat = False
    await page.reload()
    await expect(page.locator("#text-label")).to_have_text("Text to continue")
    await send(page, "Once upon")
    assert model.bodies[0]["prompt"] == "Once upon"


async def test_completion_mode_sends_a_prompt(page: Page, model: ScriptedModel) -> None:
    await page.locator(".segments label", has_text="Completion").click()
    await send(page, "Once upon")
    assert model.bodies[0]["prompt"] == "Once upon"
    assert "messages" not in model.bodies[0]
    assert await page.locator(".answer-text").text_content() == text_of(ROUNDS)
