"""The query strings below /v1/responses, checked.

This module knows nothing of bodies, stores or streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from specinfer.errors import InvalidRequest
from specinfer_router.gateway.errors import UnknownParameter

MAX_SEQUENCE_NUMBER = 2**53


class Query(BaseModel):
    """A query string: values are read from text, unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


_Query = TypeVar("_Query", bound=Query)
Includable = Literal["message.output_text.logprobs"]


class RetrieveQuery(Query):
    """The query of GET /v1/responses/{id}."""

    stream: Literal["true", "false"] = "false"
    starting_after: Annotated[int, Field(ge=0, le=MAX_SEQUENCE_NUMBER)] | None = None
    include: list[Includable] | None = None
    include_obfuscation: Literal["false"] | None = None

    def after(self, last_event_id: str | None) -> int:
        """Events with this number and lower ones were read; -1 when none was."""
        if self.starting_after is not None or not last_event_id:
            return -1 if self.starting_after is None else self.starting_after
        if not (last_event_id.isascii() and last_event_id.isdecimal() and len(last_event_id) < 16):
            raise InvalidRequest(
                "last-event-id is the sequence number of an event", field="last-event-id"
            )
        return int(last_event_id)


class ItemsQuery(Query):
    """The query of GET /v1/responses/{id}/input_items."""

    after: Annotated[str, Field(max_length=512)] | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    include: list[Includable] | None = None

    def page(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One page of items, which are given oldest first.

        Raises:
            InvalidRequest: `after` is the id of none of them.
        """
        ordered = list(items) if self.order == "asc" else list(reversed(items))
        if self.after is not None:
            ids = [item["id"] for item in ordered]
            if self.after not in ids:
                raise InvalidRequest("after is the id of no item here", field="after")
            ordered = ordered[ids.index(self.after) + 1 :]
        shown = ordered[: self.limit]
        return {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(ordered) > len(shown),
        }


def parse_query(request: Request, model: type[_Query]) -> _Query:
    """A request's query.

    Raises:
        UnknownParameter: it has a name that `model` does not know.
        InvalidRequest: a value is out of its range, or given twice.
    """
    values: dict[str, Any] = {}
    for key, value in request.query_params.multi_items():
        name = key.removesuffix("[]")
        if name == "include":
            values.setdefault(name, []).append(value)
        elif name in values:
            raise InvalidRequest(f"{name[:64]} is given twice", field=name[:64])
        else:
            values[name] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        complaint = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(complaint["loc"][0])[:64]
        if complaint["type"] == "extra_forbidden":
            raise UnknownParameter(f"unknown parameter: {name!r}", field=name) from error
        raise InvalidRequest(
            f"invalid value for {name!r}: {complaint['msg']}", field=name
        ) from error
