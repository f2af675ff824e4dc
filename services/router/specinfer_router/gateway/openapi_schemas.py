"""JSON schemas of what the API answers, for its OpenAPI document.

Bodies that are asked for come from their models; answers are plain dictionaries on the way out, so
their schemas stand here, and the fuzzer holds every answer to them. This module knows nothing of
routes.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
BOOLEAN: Schema = {"type": "boolean"}


def ref(name: str) -> Schema:
    """A schema among the components."""
    return {"$ref": f"#/components/schemas/{name}"}


def nullable(schema: Schema) -> Schema:
    """The schema, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def list_of(schema: Schema) -> Schema:
    """Any number of them."""
    return {"type": "array", "items": schema}


def one_of(*values: str | bool) -> Schema:
    """One of some values."""
    return {"enum": list(values)}


def fields(required: dict[str, Schema], **optional: Schema) -> Schema:
    """An object with these properties; answers may gain others later."""
    return {
        "type": "object",
        "properties": required | optional,
        "required": sorted(required),
    }


_LOGPROB = fields(
    {
        "token": STRING,
        "logprob": NUMBER,
        "bytes": list_of({"type": "integer", "minimum": 0, "maximum": 255}),
        "top_logprobs": list_of(
            fields({"token": STRING, "logprob": NUMBER, "bytes": list_of(COUNT)})
        ),
    }
)
_FUNCTION_CALL = fields({"name": STRING, "arguments": STRING})
_CHAT_CHOICE = fields(
    {
        "index": COUNT,
        "message": fields(
            {
                "role": one_of("assistant"),
                "content": nullable(STRING),
                "refusal": {"type": "null"},
            },
            tool_calls=list_of(
                fields({"id": STRING, "type": one_of("function"), "function": _FUNCTION_CALL})
            ),
        ),
        "logprobs": nullable(fields({"content": list_of(_LOGPROB)})),
        "finish_reason": one_of("stop", "length", "tool_calls"),
    }
)
_TEXT_CHOICE = fields(
    {
        "index": COUNT,
        "text": STRING,
        "logprobs": nullable(
            fields(
                {
                    "tokens": list_of(STRING),
                    "token_logprobs": list_of(NUMBER),
                    "top_logprobs": nullable(list_of({"type": "object"})),
                    "text_offset": list_of(COUNT),
                }
            )
        ),
        "finish_reason": one_of("stop", "length"),
    }
)
_SPECULATION = fields(
    {
        "mean_acceptance_length": NUMBER,
        "draft_acceptance_rate": NUMBER,
        "acceptance_histogram": list_of(COUNT),
        "num_spec_steps": COUNT,
        "num_accepted_draft_tokens": COUNT,
        "num_draft_tokens": COUNT,
        "num_spec_tokens": COUNT,
    },
    per_step_accepted=list_of(COUNT),
    per_step_drafted=list_of(COUNT),
)
_METRICS = fields(
    {
        "speculative_decoding": _SPECULATION,
        "queue_seconds": NUMBER,
        "prepare_seconds": NUMBER,
        "first_token_seconds": NUMBER,
        "total_seconds": NUMBER,
    }
)
_USAGE = fields(
    {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
    prompt_tokens_details=fields({"cached_tokens": COUNT}),
    completion_tokens_details=fields(
        {"accepted_prediction_tokens": COUNT, "rejected_prediction_tokens": COUNT}
    ),
)
_OUTPUT_TEXT = fields(
    {
        "type": one_of("output_text"),
        "text": STRING,
        "annotations": {"type": "array", "maxItems": 0},
        "logprobs": list_of(_LOGPROB),
    }
)
_ITEM_STATUS = one_of("in_progress", "completed", "incomplete")
_OUTPUT_ITEM = {
    "oneOf": [
        fields(
            {
                "id": STRING,
                "type": one_of("message"),
                "role": one_of("assistant"),
                "status": _ITEM_STATUS,
                "content": list_of(_OUTPUT_TEXT),
            }
        ),
        fields(
            {
                "id": STRING,
                "type": one_of("function_call"),
                "status": _ITEM_STATUS,
                "call_id": STRING,
                "name": STRING,
                "arguments": STRING,
            }
        ),
    ]
}
_RESPONSE_USAGE = fields(
    {
        "input_tokens": COUNT,
        "input_tokens_details": fields({"cached_tokens": COUNT}),
        "output_tokens": COUNT,
        "output_tokens_details": fields({"reasoning_tokens": COUNT}),
        "total_tokens": COUNT,
    }
)


def _answer(kind: str, choice: str) -> Schema:
    return fields(
        {
            "id": STRING,
            "object": one_of(kind),
            "created": COUNT,
            "model": STRING,
            "system_fingerprint": STRING,
            "choices": list_of(ref(choice)),
            "usage": ref("Usage"),
            "metrics": ref("Metrics"),
        }
    )


ANSWERS: dict[str, Schema] = {
    "Error": fields(
        {
            "error": fields(
                {
                    "message": STRING,
                    "type": STRING,
                    "param": nullable(STRING),
                    "code": STRING,
                }
            )
        }
    ),
    "ServerEvent": fields(
        {
            "data": {
                "type": "string",
                "description": "JSON, or [DONE] where there is no event name.",
            }
        },
        id=STRING,
        event=STRING,
    ),
    "Usage": _USAGE,
    "Metrics": _METRICS,
    "ChatChoice": _CHAT_CHOICE,
    "ChatCompletion": _answer("chat.completion", "ChatChoice"),
    "TextChoice": _TEXT_CHOICE,
    "Completion": _answer("text_completion", "TextChoice"),
    "Model": fields(
        {
            "id": STRING,
            "object": one_of("model"),
            "created": COUNT,
            "owned_by": STRING,
            "max_model_len": COUNT,
            "specinfer": {"type": "object"},
        }
    ),
    "ModelList": fields({"object": one_of("list"), "data": list_of(ref("Model"))}),
    "Tokenized": fields(
        {
            "count": COUNT,
            "max_model_len": COUNT,
            "tokens": list_of(COUNT),
            "token_strs": nullable(list_of(STRING)),
        }
    ),
    "Detokenized": fields({"prompt": STRING}),
    "OutputItem": _OUTPUT_ITEM,
    "Response": fields(
        {
            "id": {"type": "string", "pattern": "^resp_[0-9a-f]{32}$"},
            "object": one_of("response"),
            "created_at": COUNT,
            "status": one_of("in_progress", "completed", "incomplete", "failed", "cancelled"),
            "background": BOOLEAN,
            "error": nullable(fields({"code": STRING, "message": STRING})),
            "incomplete_details": nullable(fields({"reason": one_of("max_output_tokens")})),
            "model": STRING,
            "output": list_of(ref("OutputItem")),
            "parallel_tool_calls": BOOLEAN,
            "previous_response_id": nullable(STRING),
            "store": BOOLEAN,
            "temperature": NUMBER,
            "top_p": NUMBER,
            "tools": list_of({"type": "object"}),
            "truncation": one_of("disabled"),
            "usage": nullable(_RESPONSE_USAGE),
            "metadata": {"type": "object", "additionalProperties": STRING},
        },
        metrics=nullable(ref("Metrics")),
    ),
    "DeletedResponse": fields(
        {"id": STRING, "object": one_of("response"), "deleted": one_of(True)}
    ),
    "InputItemList": fields(
        {
            "object": one_of("list"),
            "data": list_of(fields({"id": STRING, "type": STRING})),
            "first_id": nullable(STRING),
            "last_id": nullable(STRING),
            "has_more": BOOLEAN,
        }
    ),
    "OpenApiDocument": fields({"openapi": STRING, "info": {"type": "object"}}),
}
