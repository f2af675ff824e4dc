"""POST /tokenize and /detokenize, in vLLM's shapes: what the model's tokenizer makes of a text.

This module knows nothing of generation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from specinfer.errors import InvalidRequest, NotFound
from specinfer_router.checks import check_token_ids
from specinfer_router.gateway.body import Body, parse_body
from specinfer_router.gateway.calls import Handler, json_answer
from specinfer_router.gateway.chat_request import Message, chat_messages
from specinfer_router.router import Router
from specinfer_router.tokenizer import MAX_MESSAGES

MAX_TOKENS = 2**20


class TokenizeBody(Body):
    """Either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Tokens to be put back together."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MAX_TOKENS)]


def tokenize_handler(get_router: Callable[[], Router]) -> Handler:
    """The handler of /tokenize."""

    async def tokenize(request: Request) -> Response:
        body = await parse_body(request, TokenizeBody)
        router = get_router()
        served = router.capabilities()
        _check_model(body.model, served.model)
        token_ids = await _token_ids(body, router)
        answer = {
            "count": len(token_ids),
            "max_model_len": served.max_model_len,
            "tokens": token_ids,
            "token_strs": None,
        }
        if body.return_token_strs:
            texts = await asyncio.to_thread(router.tokenizer.vocabulary.token_texts, token_ids)
            answer["token_strs"] = list(texts)
        return json_answer(request, answer)

    return tokenize


def detokenize_handler(get_router: Callable[[], Router]) -> Handler:
    """The handler of /detokenize."""

    async def detokenize(request: Request) -> Response:
        body = await parse_body(request, DetokenizeBody)
        router = get_router()
        served = router.capabilities()
        _check_model(body.model, served.model)
        check_token_ids(body.tokens, served.vocab_size, "tokens")
        return json_answer(request, {"prompt": await router.tokenizer.decode(body.tokens)})

    return detokenize


async def _token_ids(body: TokenizeBody, router: Router) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", field="prompt")
    if body.messages is not None:
        return await router.tokenizer.encode_chat(chat_messages(body.messages))
    special = body.add_special_tokens is not False
    return await router.tokenizer.encode(body.prompt or "", special=special)


def _check_model(asked: str | None, served: str) -> None:
    if asked not in (None, "", served):
        raise NotFound(f"no model {asked!r} here; this cluster serves {served!r}", field="model")
