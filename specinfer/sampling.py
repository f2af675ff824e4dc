"""How a token is drawn and when a stream ends: plain values and what is valid.

The values mean what they mean in `transformers` and in OpenAI's API. This module knows nothing of
logits, tokenizers or the wire.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from specinfer.errors import InvalidRequest

MAX_TEMPERATURE = 10.0
MAX_BIASED_TOKENS = 1024
MAX_BIAS = 100.0
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How the target draws each token.

    Attributes:
        temperature: 0 takes the most probable token; otherwise logits are divided by it.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose mass reaches top_p, in (0, 1].
        min_p: drop tokens less probable than min_p times the most probable one, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in the
            prompt or the output; 1 is off.
        presence_penalty: subtracted once from logits of tokens seen in the output.
        frequency_penalty: subtracted for each time a token was seen in the output.
        logit_bias: added to the logits of the named tokens.
        seed: decides all noise; the same seed gives the same tokens.

    Raises:
        InvalidRequest: naming the field that is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        if 0.0 < self.temperature < 1e-4:
            raise InvalidRequest("temperature is 0 or at least 0.0001", field="temperature")
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p <= 0.0:
            raise InvalidRequest("top_p is greater than 0 and at most 1", field="top_p")
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("seed", self.seed, 0, MAX_SEED)
        self._check_bias()
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))

    def __hash__(self) -> int:
        return hash((self.temperature, self.top_k, self.top_p, self.min_p, self.seed))

    def _check_bias(self) -> None:
        if len(self.logit_bias) > MAX_BIASED_TOKENS:
            raise InvalidRequest(
                f"logit_bias names at most {MAX_BIASED_TOKENS} tokens", field="logit_bias"
            )
        for token_id, bias in self.logit_bias.items():
            _check_range("logit_bias", token_id, 0, 2**31 - 1)
            _check_range("logit_bias", bias, -MAX_BIAS, MAX_BIAS)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken without noise."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether logits depend on which tokens were seen before."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True)
class StopConditions:
    """When a stream ends.

    Attributes:
        max_tokens: most tokens to generate, at least 1; None fills the model's length.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: tokens that end the text beside the model's own end tokens.
        ignore_eos: go on after the model's end token (for benchmarks).

    Raises:
        InvalidRequest: naming the field that is out of its range.
    """

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if not isinstance(self.stop, tuple):
            raise InvalidRequest("stop is a tuple of strings", field="stop")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop has at most {MAX_STOP_STRINGS} strings", field="stop")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_STRING_LENGTH:
                raise InvalidRequest(
                    f"a stop string has 1 to {MAX_STOP_STRING_LENGTH} characters", field="stop"
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidRequest(
                f"stop_token_ids has at most {MAX_STOP_TOKENS} tokens", field="stop_token_ids"
            )
        for token_id in self.stop_token_ids:
            _check_range("stop_token_ids", token_id, 0, 2**31 - 1)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # A whole number is finite, and may be too large to be asked as a float.
    if not number or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidRequest(f"{name} is a finite number, got {value!r}", field=name)
    if isinstance(low, int) and isinstance(high, int) and not isinstance(value, int):
        raise InvalidRequest(f"{name} is a whole number, got {value!r}", field=name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is between {low:g} and {high:g}, got {value}", field=name)
