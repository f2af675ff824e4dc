"""Errors as OpenAI's clients know them: a status, a JSON body and what they read about retries.

`specinfer.errors` says what went wrong; this module only gives it its HTTP form. It knows nothing
of routes, requests or what was generated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from specinfer.errors import InvalidRequest, SpecinferError

REQUEST_ID_HEADER = "x-request-id"

_STATUS_OF_REASON = {"BODY_TOO_LARGE": 413, "INVALID_CHECKPOINT": 500, "MISMATCH": 409}
_STATUS_OF_CODE = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "NOT_FOUND": 404,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "ABORTED": 409,
    "CANCELLED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
    "INTERNAL": 500,
}
_TYPE_OF_STATUS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class UnknownParameter(InvalidRequest):
    """A field that the route does not know."""

    reason = "UNKNOWN_PARAMETER"


class UnsupportedParameter(InvalidRequest):
    """A field of OpenAI's that this server does not serve."""

    reason = "UNSUPPORTED_PARAMETER"


class UnsupportedValue(InvalidRequest):
    """A value of OpenAI's, of a field that is served, that this server does not serve."""

    reason = "UNSUPPORTED_VALUE"


class BodyTooLarge(InvalidRequest):
    """A body past the bound."""

    reason = "BODY_TOO_LARGE"


def status_of(error: SpecinferError) -> int:
    """The HTTP status of an error."""
    return _STATUS_OF_REASON.get(error.reason) or _STATUS_OF_CODE.get(error.code, 500)


def error_body(error: SpecinferError) -> dict[str, Any]:
    """OpenAI's error object: {"error": {message, type, param, code}}."""
    status = status_of(error)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = error.reason.lower()
    if error.code == "NOT_FOUND" and error.field == "model":
        code = "model_not_found"
    return {
        "error": {
            "message": _sendable(error.message),
            "type": _TYPE_OF_STATUS.get(status, kind),
            "param": _sendable(error.field) or None,
            "code": code,
        }
    }


def error_headers(error: SpecinferError, request_id: str) -> dict[str, str]:
    """The request's id, and whether and when the same call may be tried again."""
    headers = {
        # The call's own id: one of its choices may have failed under an id made from it.
        REQUEST_ID_HEADER: request_id or error.request_id,
        "x-should-retry": "true" if error.retryable else "false",
    }
    if error.retryable and error.retry_after is not None:
        headers["retry-after-ms"] = str(math.ceil(error.retry_after * 1000))
        headers["retry-after"] = str(math.ceil(error.retry_after))
    if error.code == "UNAUTHENTICATED":
        headers["www-authenticate"] = "Bearer"
    return headers


def error_response(error: SpecinferError, request_id: str) -> JSONResponse:
    """An error before anything was sent."""
    return JSONResponse(
        error_body(error),
        status_code=status_of(error),
        headers=error_headers(error, request_id),
    )


async def http_error(request: Request, error: Exception) -> Response:
    """What starlette itself refuses, an unknown path or method, in the same shape."""
    assert isinstance(error, HTTPException)
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    message = f"{error.detail}: {request.method} {request.url.path}"
    code = "_".join(str(error.detail).lower().split())
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors name the caller's parameter where the router has another name for it."""
    try:
        yield
    except SpecinferError as error:
        error.field = names.get(error.field, error.field)
        raise


def _sendable(text: str) -> str:
    """Without halves of surrogate pairs, which a caller's JSON can hold and UTF-8 cannot."""
    return text.encode(errors="replace").decode()
