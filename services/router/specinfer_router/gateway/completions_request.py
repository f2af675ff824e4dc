"""The body of a completion, and the requests that it makes: one for each prompt and choice.

This module knows nothing of streams or answers.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from specinfer.errors import InvalidRequest
from specinfer.messages import GenerateRequest
from specinfer_router.gateway.errors import UnsupportedValue
from specinfer_router.gateway.fields import (
    GenerationFields,
    check_stream_options,
    choice_id,
    grammar_of,
    priority_of,
    sampling_of,
    speculation_of,
    stop_of,
)

MAX_PROMPTS = 16
MAX_CHOICES = 16
MAX_LEGACY_LOGPROBS = 5
DEFAULT_MAX_TOKENS = 16

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionBody(GenerationFields):
    """The body of POST /v1/completions."""

    unsupported: ClassVar[dict[str, str]] = {
        "suffix": "text is only continued here, not filled in",
    }

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LEGACY_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None


def completion_requests(body: CompletionBody, request_id: str) -> list[GenerateRequest]:
    """One request for each choice, those of the first prompt first; raises InvalidRequest."""
    check_stream_options(body)
    prompts, per_prompt = prompts_of(body), body.n or 1
    if len(prompts) * per_prompt > MAX_CHOICES:
        raise InvalidRequest(f"prompts times n is at most {MAX_CHOICES}", field="n")
    if body.best_of not in (None, per_prompt):
        raise UnsupportedValue("best_of is not served unless it equals n", field="best_of")
    if body.echo and (body.logprobs is not None or not isinstance(prompts[0], str)):
        raise UnsupportedValue(
            "echo is served for prompts of text and without logprobs", field="echo"
        )
    number = len(prompts) * per_prompt
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return [
        GenerateRequest(
            prompt=prompt if isinstance(prompt, str) else None,
            token_ids=None if isinstance(prompt, str) else tuple(prompt),
            model=body.model,
            sampling=sampling_of(body, index % per_prompt),
            random_seed=body.seed is None,
            stop=stop_of(body, max_tokens),
            num_logprobs=body.logprobs,
            speculation=speculation_of(body),
            request_id=choice_id(request_id, index, number),
            grammar=grammar_of(body.structured_outputs),
            priority=priority_of(body, None),
            detail=bool(body.speculation and body.speculation.detail),
        )
        for index, prompt in enumerate(prompt for prompt in prompts for _ in range(per_prompt))
    ]


def prompts_of(body: CompletionBody) -> list[str | list[int]]:
    """The prompts, however they were given."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    token_ids = [item for item in prompt if isinstance(item, int)]
    if token_ids:
        return [token_ids]
    return [item for item in prompt if not isinstance(item, int)]
