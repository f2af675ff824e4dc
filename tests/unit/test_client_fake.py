"""The fake router of `specinfer.testing`: what it promises to those who script it."""

from __future__ import annotations

import pytest

from specinfer import Client, NotFound, ResourceExhausted, RetryPolicy, Unavailable
from specinfer.messages import GenerateRequest
from specinfer.testing import FakeReply, FakeRouter, fake_capabilities, words_of

ONCE = RetryPolicy(max_attempts=1)


def test_words_are_tokens_and_make_up_the_text() -> None:
    for text in ("", "a", " a b\nc ", "  "):
        assert "".join(words_of(text)) == text
    assert words_of(" a b\n") == [" a", " b", "\n"]


def test_one_text_for_all_or_one_for_each() -> None:
    with FakeRouter("same") as router, Client(router.address) as client:
        assert [client.generate("hi").text for _ in range(3)] == ["same"] * 3
    with FakeRouter(["one", "two"]) as router, Client(router.address) as client:
        assert [client.generate("hi").text for _ in range(3)] == ["one", "two", "two"]


def test_an_answer_may_depend_on_the_request() -> None:
    def answer(request: GenerateRequest) -> str:
        return f"you said {request.prompt}"

    with FakeRouter(answer) as router, Client(router.address) as client:
        assert client.generate("boo").text == "you said boo"


def test_limits_and_stop_strings_hold() -> None:
    with FakeRouter("a b c d e") as router, Client(router.address) as client:
        short = client.generate("hi", max_tokens=2)
        assert (short.text, short.finish_reason) == ("a b", "length")
        stopped = client.generate("hi", stop=[" e", " d"])
        assert (stopped.text, stopped.finish_reason, stopped.stop_match) == ("a b c", "stop", " d")
        assert client.generate("hi", seed=5).seed == 5


def test_speculation_changes_rounds_and_no_token() -> None:
    with FakeRouter("a b c d e") as router, Client(router.address) as client:
        on, off = client.generate("hi"), client.generate("hi", speculation=False)
    assert on.token_ids == off.token_ids
    assert (len(on.rounds), len(off.rounds)) == (2, 5)
    assert off.speculation.root_only_reasons == (("disabled", 5),)


def test_errors_come_when_they_are_told_to() -> None:
    full = ResourceExhausted("full", retry_after=7)
    late = FakeReply("a b c d", error=Unavailable("gone"), error_at=2)
    script = [FakeReply(error=full), late]
    with FakeRouter(script) as router, Client(router.address, retry=ONCE) as client:
        with pytest.raises(ResourceExhausted) as caught:
            client.generate("hi")
        assert caught.value.retry_after == 7
        stream = client.stream("hi")
        assert next(stream).text == "a b"
        with pytest.raises(Unavailable, match="gone"):
            next(stream)


def test_what_it_says_of_itself_and_after_its_end() -> None:
    router = FakeRouter(capabilities=fake_capabilities(model="mine", chat=False))
    with router, Client(router.address, retry=ONCE) as client:
        assert (client.capabilities().model, client.capabilities().chat) == ("mine", False)
        with pytest.raises(NotFound):
            client.explain("nothing")
        router.close()
        router.close()
        with pytest.raises(Unavailable):
            client.capabilities()
