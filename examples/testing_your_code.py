"""Test code that uses the SDK, without a cluster: a fake router on a free port.

Run it with pytest, or as it is. It needs no `--router`.
"""

from specinfer import Client, RetryPolicy
from specinfer.testing import FakeReply, FakeRouter


def summarise(client: Client, text: str) -> str:
    """The code under test."""
    return client.chat(f"In three words: {text}", max_tokens=16).text.strip()


def test_the_question_holds_the_text() -> None:
    with FakeRouter(" Short and sweet. ") as router, Client(router.address) as client:
        assert summarise(client, "a long story") == "Short and sweet."
    assert "a long story" in str(router.requests[0].messages)


def test_a_broken_stream_is_not_noticed() -> None:
    retry = RetryPolicy(initial_backoff=0.001)
    reply = FakeReply("Short and sweet.", break_at=(1, 2))
    with FakeRouter(reply) as router, Client(router.address, retry=retry) as client:
        assert summarise(client, "a long story") == "Short and sweet."
    assert [offset for _, offset in router.resumed] == [1, 2]


if __name__ == "__main__":
    test_the_question_holds_the_text()
    test_a_broken_stream_is_not_noticed()
    print("2 passed")
