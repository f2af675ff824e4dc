"""GET /openapi.json: the API's own description, OpenAPI 3.1, with every answer that it gives.

Bodies and queries come from the models that check them, answers from `openapi_schemas`, and bounds
that depend on the served model from its capabilities. A fuzzer holds the API to this document. This
module knows nothing of how routes work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from specinfer.messages import Capabilities
from specinfer.sampling import (
    MAX_BIAS,
    MAX_BIASED_TOKENS,
    MAX_STOP_STRING_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    MAX_TEMPERATURE,
)
from specinfer_router.gateway.body import Body
from specinfer_router.gateway.calls import api_route, json_answer
from specinfer_router.gateway.chat_request import ChatBody
from specinfer_router.gateway.completions_request import CompletionBody
from specinfer_router.gateway.openapi_schemas import ANSWERS, Schema, ref
from specinfer_router.gateway.responses_query import ItemsQuery, RetrieveQuery
from specinfer_router.gateway.responses_request import ResponseBody
from specinfer_router.gateway.tokenize import DetokenizeBody, TokenizeBody
from specinfer_router.router import Router

_REF = "#/components/schemas/{model}"
_ALWAYS = (400, 401, 403, 429, 500, 503)
_GENERATING = (*_ALWAYS, 404, 409, 413, 504)
_STORED = (*_ALWAYS, 404)
_MEANINGS = {
    200: "The answer.",
    400: "The request cannot be served as it is; `param` names what to change.",
    401: "No key, or one that is not known.",
    403: "The key may not do this.",
    404: "There is no such model or response.",
    409: "The session was cancelled, taken over, or is another model's.",
    413: "The body is too large.",
    429: "Too much at once; `retry-after-ms` says when to try again.",
    500: "A fault of this server's.",
    503: "Nobody can serve this at the moment; try again.",
    504: "The deadline passed.",
}


@dataclass(frozen=True)
class Operation:
    """One route.

    Attributes:
        method: in lower case.
        path: with its parameters in braces.
        name: operation id.
        summary: one line.
        answer: schema of the answer, among the components.
        errors: statuses of the errors.
        body: model of the body, or None.
        query: model of the query, or None.
        streams: whether the answer may also be an event stream.
    """

    method: str
    path: str
    name: str
    summary: str
    answer: str
    errors: tuple[int, ...]
    body: type[Body] | None = None
    query: type[BaseModel] | None = None
    streams: bool = False


_RESPONSE_PATH = "/v1/responses/{response_id}"
OPERATIONS = (
    Operation(
        "post",
        "/v1/chat/completions",
        "createChatCompletion",
        "Answer a conversation",
        "ChatCompletion",
        _GENERATING,
        ChatBody,
        streams=True,
    ),
    Operation(
        "post",
        "/v1/completions",
        "createCompletion",
        "Continue a text",
        "Completion",
        _GENERATING,
        CompletionBody,
        streams=True,
    ),
    Operation(
        "post",
        "/v1/responses",
        "createResponse",
        "Answer, and keep the answer",
        "Response",
        _GENERATING,
        ResponseBody,
        streams=True,
    ),
    Operation(
        "get",
        _RESPONSE_PATH,
        "getResponse",
        "A stored response, or its events after a sequence number",
        "Response",
        (*_STORED, 409),
        query=RetrieveQuery,
        streams=True,
    ),
    Operation(
        "delete",
        _RESPONSE_PATH,
        "deleteResponse",
        "Forget a response",
        "DeletedResponse",
        _STORED,
    ),
    Operation(
        "post",
        f"{_RESPONSE_PATH}/cancel",
        "cancelResponse",
        "End a running response",
        "Response",
        _STORED,
    ),
    Operation(
        "get",
        f"{_RESPONSE_PATH}/input_items",
        "listInputItems",
        "The items of a response's input",
        "InputItemList",
        _STORED,
        query=ItemsQuery,
    ),
    Operation("get", "/v1/models", "listModels", "The served model", "ModelList", _ALWAYS),
    Operation("get", "/v1/models/{model}", "getModel", "One model", "Model", (*_ALWAYS, 404)),
    *(
        operation
        for prefix, suffix in (("", ""), ("/v1", "V1"))
        for operation in (
            Operation(
                "post",
                f"{prefix}/tokenize",
                f"tokenize{suffix}",
                "The tokens of a text or a conversation",
                "Tokenized",
                (*_ALWAYS, 404, 413),
                TokenizeBody,
            ),
            Operation(
                "post",
                f"{prefix}/detokenize",
                f"detokenize{suffix}",
                "The text of tokens",
                "Detokenized",
                (*_ALWAYS, 404, 413),
                DetokenizeBody,
            ),
        )
    ),
    Operation(
        "get", "/openapi.json", "getOpenApi", "This document", "OpenApiDocument", (401, 500, 503)
    ),
)


def openapi_route(get_router: Callable[[], Router]) -> Route:
    """The route of the document; raises nothing but what `get_router` does."""

    async def document(request: Request) -> Response:
        served = get_router().capabilities()
        return json_answer(request, await asyncio.to_thread(openapi_document, served))

    return api_route("/openapi.json", document, methods=("GET",))


def openapi_document(served: Capabilities) -> dict[str, Any]:
    """The document for a cluster."""
    bodies = _body_schemas(served)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "specinfer",
            "version": served.version,
            "description": "Lossless speculative decoding behind OpenAI's API.",
        },
        "security": [{}, {"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": ANSWERS | bodies,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _body_schemas(served: Capabilities) -> dict[str, Schema]:
    """The models of all bodies, with the bounds that only the router checks."""
    models = [(each.body, "validation") for each in OPERATIONS if each.body is not None]
    _, found = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]
    schemas: dict[str, Schema] = found["$defs"]
    bounds = _bounds(served)
    for name in ("ChatBody", "CompletionBody", "ResponseBody", "TokenizeBody", "DetokenizeBody"):
        for field, bound in bounds.items():
            for schema in _alternatives(schemas[name]["properties"].get(field, {})):
                schema |= bound
    return schemas


def _alternatives(schema: Schema) -> list[Schema]:
    """The schema itself, or those of its alternatives that are not null."""
    return [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]


def _bounds(served: Capabilities) -> dict[str, Schema]:
    longest = {"minimum": 1, "maximum": served.max_model_len - 1}
    return {
        # An empty name is that of the one model.
        "model": {"enum": [served.model, ""]},
        "max_tokens": longest,
        "max_completion_tokens": longest,
        "max_output_tokens": longest,
        "temperature": {"minimum": 0, "maximum": MAX_TEMPERATURE},
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"minimum": -1, "maximum": 2**31 - 1},
        "min_p": {"minimum": 0, "maximum": 1},
        "repetition_penalty": {"minimum": 0.01, "maximum": 100},
        "presence_penalty": {"minimum": -2, "maximum": 2},
        "frequency_penalty": {"minimum": -2, "maximum": 2},
        "logit_bias": {
            "maxProperties": MAX_BIASED_TOKENS,
            "propertyNames": {"pattern": "^[0-9]{1,3}$"},
            "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
        },
        "stop": {
            "minLength": 1,
            "maxLength": MAX_STOP_STRING_LENGTH,
            "maxItems": MAX_STOP_STRINGS,
        },
        "stop_token_ids": {
            "maxItems": MAX_STOP_TOKENS,
            "items": {"type": "integer", "minimum": 0, "maximum": served.vocab_size - 1},
        },
    }


def _described(operation: Operation) -> dict[str, Any]:
    description: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "parameters": _parameters(operation),
        "responses": _answers(operation),
    }
    if operation.body is not None:
        content = {"application/json": {"schema": ref(operation.body.__name__)}}
        description["requestBody"] = {"required": True, "content": content}
    return description


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string"}}
        for part in operation.path.split("/")
        if part.startswith("{")
    ]
    if operation.query is not None:
        properties = operation.query.model_json_schema(ref_template=_REF)["properties"]
        for name, schema in properties.items():
            (present,) = _alternatives(schema)
            parameters.append({"name": name, "in": "query", "required": False, "schema": present})
    # A response is resumed by reading it, not by asking for it again.
    if operation.streams and operation.body is not ResponseBody:
        parameters.append(
            {
                "name": "last-event-id",
                "in": "header",
                "required": False,
                "description": "Id of the last event that was read of a stream.",
                "schema": {"type": "string"},
            }
        )
    return parameters


def _answers(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": ref(operation.answer)}}
    if operation.streams:
        content["text/event-stream"] = {"schema": ref("ServerEvent")}
    answers = {"200": _answer(200, content)}
    for status in sorted(operation.errors):
        content = {"application/json": {"schema": ref("Error")}}
        if status == 400:
            # What is no HTTP, or has too long headers, reaches no route.
            content["text/plain"] = {"schema": {"type": "string"}}
        answers[str(status)] = _answer(status, content)
    return answers


def _answer(status: int, content: dict[str, Any]) -> dict[str, Any]:
    headers: dict[str, Any] = {"x-request-id": {"schema": {"type": "string"}}}
    # What reaches no route has no id.
    headers["x-request-id"]["required"] = status != 400
    if status in (429, 503):
        for name in ("retry-after", "retry-after-ms"):
            headers[name] = {"schema": {"type": "string", "pattern": "^[0-9]+$"}}
    return {"description": _MEANINGS[status], "headers": headers, "content": content}
