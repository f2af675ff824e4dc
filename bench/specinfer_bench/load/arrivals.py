"""When requests come and what they ask: drawn from a Poisson process, or read from a trace.

Everything is fixed before the first request is sent, so what a server does cannot change when the
next one comes. This module knows nothing of clients or servers.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specinfer.errors import InvalidRequest

MAX_ARRIVALS = 100_000
MAX_TRACE_BYTES = 16 * 1024 * 1024
MAX_TOKENS = 1_000_000
TRACE_KEYS = ("offset", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Arrival:
    """One request of the plan.

    Attributes:
        offset: seconds after the start of the run at which it comes.
        prompt: text of the question.
        max_tokens: tokens to generate; no more and no fewer.
        seed: decides the request's noise.
    """

    offset: float
    prompt: str
    max_tokens: int
    seed: int


def poisson(
    prompts: Sequence[str], *, rate: float, num_requests: int, max_tokens: int, seed: int
) -> tuple[Arrival, ...]:
    """Requests with independent exponential gaps, `rate` a second on average.

    The same arguments give the same requests; prompts are drawn evenly.

    Raises:
        InvalidRequest: naming the argument that is out of its range.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise InvalidRequest("rate is more than 0 requests a second", field="rate")
    if not 1 <= num_requests <= MAX_ARRIVALS:
        raise InvalidRequest(f"requests are 1 to {MAX_ARRIVALS}", field="requests")
    chance = random.Random(seed)
    offset, arrivals = 0.0, []
    for index in range(num_requests):
        offset += chance.expovariate(rate)
        arrivals.append(Arrival(offset, chance.choice(prompts), max_tokens, seed + index))
    return tuple(arrivals)


@dataclass(frozen=True)
class TraceEntry:
    """One line of a trace: seconds after its start, and lengths in tokens."""

    offset: float
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path) -> tuple[TraceEntry, ...]:
    """A trace: JSON lines with "offset", "prompt_tokens" and "output_tokens", in order of time.

    Raises:
        InvalidRequest: naming the line at fault.
    """
    try:
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise InvalidRequest(f"{path} is larger than 16 MiB", field="trace")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {path}: {error}", field="trace") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not 1 <= len(numbered) <= MAX_ARRIVALS:
        raise InvalidRequest(f"{path} has 1 to {MAX_ARRIVALS} requests", field="trace")
    entries = tuple(_entry(f"{path}:{number}", line) for number, line in numbered)
    offsets = [entry.offset for entry in entries]
    if offsets != sorted(offsets):
        raise InvalidRequest(f"{path} is not in order of time", field="trace")
    return entries


def _entry(place: str, line: str) -> TraceEntry:
    try:
        found: Any = json.loads(line)
        offset, *lengths = (found[key] for key in TRACE_KEYS)
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{place} needs {', '.join(TRACE_KEYS)}", field="trace") from error
    if not _is_number(offset) or offset < 0:
        raise InvalidRequest(f"{place}: offset is 0 seconds or more", field="trace")
    if not all(type(length) is int and 1 <= length <= MAX_TOKENS for length in lengths):
        raise InvalidRequest(f"{place}: lengths are 1 to {MAX_TOKENS} tokens", field="trace")
    return TraceEntry(float(offset), *lengths)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(float(str(value)))


def from_trace(
    entries: Sequence[TraceEntry],
    prompts: Sequence[str],
    *,
    characters_a_token: float,
    speed: float,
    seed: int,
) -> tuple[Arrival, ...]:
    """A trace's requests over our prompts, `speed` times as fast as it was recorded.

    A prompt is a text that is repeated or cut to about as many tokens as the trace says, at
    `characters_a_token`; results carry the lengths that the server counted.

    Raises:
        InvalidRequest: when `speed` is not more than 0.
    """
    if not (math.isfinite(speed) and speed > 0):
        raise InvalidRequest("speed is more than 0", field="speed")
    chance = random.Random(seed)
    return tuple(
        Arrival(
            entry.offset / speed,
            _of_length(chance.choice(prompts), round(entry.prompt_tokens * characters_a_token)),
            entry.output_tokens,
            seed + index,
        )
        for index, entry in enumerate(entries)
    )


def _of_length(text: str, num_characters: int) -> str:
    length = max(1, num_characters)
    repeated = (text + " ") * (length // (len(text) + 1) + 1)
    return repeated[:length]
