"""From committed tokens to the events and the object of one response.

Every event's sequence number follows from the tokens alone: the first two have 0 and 1, and those
that token k (counted from 1) brings have STRIDE * k and up. However the tokens came in rounds, and
whichever router reads them, the numbers are the same; so a stream is resumed by writing it anew
and leaving out what was sent. Pieces of text that come together are sent as one event with the last
one's number, so there are gaps. This module knows nothing of HTTP, sessions or stores.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from specinfer.messages import Finished, TokenLogprob, TokensEvent
from specinfer_router.gateway.logprobs import chat_logprobs
from specinfer_router.gateway.tools import ToolPlan
from specinfer_router.gateway.tools_parser import ArgumentsDelta, CallStart, ContentDelta, ToolDelta
from specinfer_router.gateway.usage import RoundCounts, metrics_of
from specinfer_router.text import Detokenizer, Vocabulary

# More than the events that one token can bring.
STRIDE = 100

_TEXT_DELTA = "response.output_text.delta"
_MERGED = (_TEXT_DELTA, "response.function_call_arguments.delta")


# What a response says of its end before it comes, though the end may be known from the store.
_BEFORE: dict[str, Any] = {
    "status": "in_progress",
    "completed_at": None,
    "error": None,
    "incomplete_details": None,
    "usage": None,
    "metrics": None,
}


@dataclass
class _OpenItem:
    """The output item that is being written."""

    item: dict[str, Any]
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_message(self) -> bool:
        return bool(self.item["type"] == "message")


class ResponseWriter:
    """Writes one response from its first token on.

    Attributes:
        response: the response object as far as it is known.
    """

    def __init__(
        self,
        response: dict[str, Any],
        plan: ToolPlan,
        *,
        vocabulary: Vocabulary,
        detokenizer: Detokenizer,
        eos_token_ids: frozenset[int],
        after: int = -1,
    ) -> None:
        """Begin.

        Args:
            response: the object; what it says of its output and its end is left out.
            plan: how calls of tools are read.
            vocabulary: for the tokens of logprobs.
            detokenizer: at the start of the completion.
            eos_token_ids: tokens without text.
            after: events with this sequence number and lower ones are left out.
        """
        self.response = response | _BEFORE
        self.response["output"] = []
        self._suffix = response["id"].removeprefix("resp_")
        self._parser = plan.parser(self._suffix)
        self._vocabulary = vocabulary
        self._detokenizer = detokenizer
        self._eos_token_ids = eos_token_ids
        self._after = after
        self._num_tokens = 0
        self._next_number = 0
        self._logprobs: list[dict[str, Any]] = []
        self._counts = RoundCounts()
        self._open: _OpenItem | None = None
        self._out: list[dict[str, Any]] = []

    def begin(self) -> list[dict[str, Any]]:
        """The events before the first token."""
        self._emit("response.created", response=dict(self.response))
        self._emit("response.in_progress", response=dict(self.response))
        return self._taken()

    def take(self, event: TokensEvent) -> list[dict[str, Any]]:
        """The events of some tokens, which follow those taken before."""
        self._counts.add(event.round)
        for index, token_id in enumerate(event.token_ids):
            self._num_tokens += 1
            self._next_number = self._num_tokens * STRIDE
            if event.logprobs:
                self._add_logprob(event.logprobs[index])
            if token_id not in self._eos_token_ids:
                self._read(self._parser.push(self._detokenizer.push(token_id)))
        return self._taken()

    def so_far(self) -> dict[str, Any]:
        """The response with its output up to now; nothing can be taken afterwards."""
        self._close_item("in_progress")
        return self.response

    def finish(self, finished: Finished) -> list[dict[str, Any]]:
        """The last events; `response` is complete afterwards."""
        self._next_number = (self._num_tokens + 1) * STRIDE
        self._read(self._parser.push(self._detokenizer.flush()))
        self._read(self._parser.finish())
        complete = finished.reason == "stop"
        if self._open is None and not self.response["output"]:
            self._open_message()
        self._close_item("completed" if complete else "incomplete")
        self._tell_end(finished)
        self._emit(
            "response.completed" if complete else "response.incomplete",
            response=dict(self.response),
        )
        return self._taken()

    def fail(self, message: str) -> list[dict[str, Any]]:
        """The last events of a response that broke for good."""
        self._next_number = (self._num_tokens + 1) * STRIDE
        self._close_item("incomplete")
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": message}}
        self._emit("response.failed", response=dict(self.response))
        return self._taken()

    def _read(self, deltas: Sequence[ToolDelta]) -> None:
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                self._add_text(delta.text)
            elif isinstance(delta, CallStart):
                self._close_item("completed")
                self._open_call(delta)
            else:
                self._add_arguments(delta)

    def _add_text(self, text: str) -> None:
        if self._open is None or not self._open.is_message:
            self._close_item("completed")
            self._open_message()
        assert self._open is not None
        logprobs, self._logprobs = self._logprobs, []
        self._open.text += text
        self._open.logprobs += logprobs
        self._emit(_TEXT_DELTA, **self._place(), content_index=0, delta=text, logprobs=logprobs)

    def _add_arguments(self, delta: ArgumentsDelta) -> None:
        assert self._open is not None
        self._open.text += delta.text
        self._emit("response.function_call_arguments.delta", **self._place(), delta=delta.text)

    def _add_logprob(self, logprob: TokenLogprob) -> None:
        self._logprobs += chat_logprobs([logprob], self._vocabulary)

    def _open_message(self) -> None:
        number = len(self.response["output"])
        item = {
            "id": f"msg_{self._suffix}_{number}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._open = _OpenItem(item)
        self._emit("response.output_item.added", output_index=number, item=dict(item))
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._emit("response.content_part.added", **self._place(), content_index=0, part=part)

    def _open_call(self, start: CallStart) -> None:
        number = len(self.response["output"])
        item = {
            "id": f"fc_{self._suffix}_{number}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": start.call_id,
            "name": start.name,
            "arguments": "",
        }
        self._logprobs = []
        self._open = _OpenItem(item)
        self._emit("response.output_item.added", output_index=number, item=dict(item))

    def _close_item(self, status: str) -> None:
        """End the open item, if there is one, and put it into the output."""
        if self._open is None:
            return
        item, text, place = self._open.item, self._open.text, self._place()
        item["status"] = status
        if self._open.is_message:
            logprobs = self._open.logprobs
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
            place["content_index"] = 0
            self._emit("response.output_text.done", **place, text=text, logprobs=logprobs)
            self._emit("response.content_part.done", **place, part=part)
            item["content"] = [part]
        else:
            item["arguments"] = text
            name = item["name"]
            self._emit("response.function_call_arguments.done", **place, arguments=text, name=name)
        index = place["output_index"]
        self._emit("response.output_item.done", output_index=index, item=dict(item))
        self.response["output"].append(item)
        self._open = None

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open.item["id"], "output_index": len(self.response["output"])}

    def _tell_end(self, finished: Finished) -> None:
        if finished.reason == "stop":
            self.response |= {"status": "completed", "completed_at": int(time.time())}
        elif finished.reason == "length":
            self.response |= {
                "status": "incomplete",
                "incomplete_details": {"reason": "max_output_tokens"},
            }
        else:
            self.response["status"] = "cancelled"
        usage = finished.usage
        self.response["usage"] = {
            "input_tokens": usage.num_prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.num_cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": usage.num_completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        }
        self.response["metrics"] = metrics_of([finished], [self._counts], detail=False)

    def _emit(self, kind: str, **fields: Any) -> None:
        number = self._next_number
        self._next_number += 1
        if number <= self._after:
            return
        last = self._out[-1] if self._out else None
        if last is not None and kind in _MERGED and last["type"] == kind:
            last["delta"] += fields["delta"]
            last["sequence_number"] = number
            if kind == _TEXT_DELTA:
                last["logprobs"] = last["logprobs"] + fields["logprobs"]
            return
        self._out.append({"type": kind, "sequence_number": number, **fields})

    def _taken(self) -> list[dict[str, Any]]:
        out, self._out = self._out, []
        return out
