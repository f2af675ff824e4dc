"""A scripted verify worker that stops by itself in the middle of an output.

Knows nothing of what tests do meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.kit.fake_workers import FakeSession, info_of
from tests.kit.gateway import ScriptedVerifier
from tests.kit.tokenizers import byte_level_tokenizer


@dataclass
class PausingVerifier(ScriptedVerifier):
    """A scripted verify worker that closes its gate by itself.

    Attributes:
        pause_at: length of an output at which it answers nothing more until the gate is set.
    """

    pause_at: int = -1

    def _target(self, token_ids: Sequence[int], session: FakeSession) -> int:
        if len(token_ids) - session.num_prompt_tokens == self.pause_at:
            self.gate.clear()
        return super()._target(token_ids, session)

    def go_on(self, pause_at: int = -1) -> None:
        """Answer again, until the next pause."""
        self.pause_at = pause_at
        self.gate.set()


def pausing(text: str, pause_at: int) -> PausingVerifier:
    """A verify worker whose target says `text`, with a pause in it."""
    script = byte_level_tokenizer().encode(text).ids
    return PausingVerifier(info_of("verify"), script=script, pause_at=pause_at)
