"""A router for your own tests: no models, no cluster, the real protocol on a free port.

    from specinfer import Client
    from specinfer.testing import FakeRouter

    def test_the_answer() -> None:
        with FakeRouter("Four.") as router, Client(router.address) as client:
            assert client.chat("What is two and two?").text == "Four."

It answers with what a test scripts: texts, errors, waits, streams that break or fall silent. Needs
grpcio and protobuf and nothing else; it knows nothing of models, sampling or pytest.
"""

from specinfer.testing.router import Answer, Answers, FakeRouter
from specinfer.testing.script import FakeReply, FakeStore, fake_capabilities, words_of

__all__ = [
    "Answer",
    "Answers",
    "FakeReply",
    "FakeRouter",
    "FakeStore",
    "fake_capabilities",
    "words_of",
]
