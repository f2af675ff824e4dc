"""Log probabilities in the two shapes that OpenAI's API has.

They are the target's own, before temperature and cuts. Tokens without text, such as the end token,
are left out, as OpenAI leaves them out. This module knows nothing of requests or streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specinfer.messages import TokenLogprob
from specinfer_router.text import Vocabulary

# JSON has no minus infinity; OpenAI's API uses this for what is practically impossible.
LEAST_LOGPROB = -9999.0


def chat_logprobs(logprobs: Sequence[TokenLogprob], vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Chat's shape: a list of {token, logprob, bytes, top_logprobs}."""
    return [
        _entry(item.token_id, item.logprob, vocabulary)
        | {"top_logprobs": [_entry(token, logprob, vocabulary) for token, logprob in item.top]}
        for item in logprobs
        if item.token_id not in vocabulary.special_ids
    ]


def legacy_logprobs(
    logprobs: Sequence[TokenLogprob], vocabulary: Vocabulary, offset: int
) -> dict[str, Any]:
    """Completions' shape: parallel lists; `offset` is where the first token starts in the text."""
    kept = [item for item in logprobs if item.token_id not in vocabulary.special_ids]
    texts = vocabulary.token_texts([item.token_id for item in kept])
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": list(texts),
        "token_logprobs": [_finite(item.logprob) for item in kept],
        "top_logprobs": [_top(item, vocabulary) for item in kept],
        "text_offset": offsets,
    }


def _entry(token_id: int, logprob: float, vocabulary: Vocabulary) -> dict[str, Any]:
    content = vocabulary.token_bytes(token_id)
    return {
        "token": content.decode(errors="replace"),
        "logprob": _finite(logprob),
        "bytes": list(content),
    }


def _top(item: TokenLogprob, vocabulary: Vocabulary) -> dict[str, float]:
    texts = vocabulary.token_texts([token for token, _ in item.top])
    found: dict[str, float] = {}
    for text, (_, logprob) in zip(texts, item.top, strict=True):
        # Two parts of characters read alike; the more probable one comes first and stays.
        found.setdefault(text, _finite(logprob))
    return found


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
