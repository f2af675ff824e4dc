"""What a request may ask for, checked before any work is done for it.

`specinfer.sampling` checks what is valid anywhere; this module checks what is valid for the model
that is served. It knows nothing of sessions or workers.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from specinfer.errors import InvalidRequest, NotFound
from specinfer.messages import GenerateRequest, SpeculationOptions, WorkerInfo
from specinfer.sampling import MAX_LOGPROBS
from specinfer.tree import MAX_TREE_NODES
from specinfer_router.access import MAX_PRIORITY
from specinfer_router.policy import num_nodes
from specinfer_router.text import check_unicode

MAX_REQUEST_ID_LENGTH = 128
MAX_AFFINITY_KEY_LENGTH = 256
MAX_TOOLS = 128
MAX_TOOLS_LENGTH = 256 * 1024


def check_request(request: GenerateRequest, target: WorkerInfo, max_tree_nodes: int) -> None:
    """Check everything but the prompt.

    Raises:
        NotFound: another model than the one that is served.
        InvalidRequest: naming the field that is out of its range.
    """
    if request.model not in ("", target.model_name):
        raise NotFound(
            f"no model {request.model!r} here; this cluster serves {target.model_name!r}",
            field="model",
        )
    if request.num_logprobs is not None and not 0 <= request.num_logprobs <= MAX_LOGPROBS:
        raise InvalidRequest(f"num_logprobs is 0 to {MAX_LOGPROBS}", field="num_logprobs")
    check_token_ids(tuple(request.sampling.logit_bias), target.vocab_size, "logit_bias")
    check_token_ids(request.stop.stop_token_ids, target.vocab_size, "stop_token_ids")
    check_speculation(request.speculation, max_tree_nodes)
    check_extras(request)


def check_request_id(request_id: str) -> None:
    """Raise InvalidRequest unless the id may stand in logs, spans and metadata."""
    printable = request_id.isascii() and request_id.isprintable()
    if len(request_id) > MAX_REQUEST_ID_LENGTH or not (printable or not request_id):
        raise InvalidRequest(
            f"a request id has at most {MAX_REQUEST_ID_LENGTH} printable ASCII characters",
            field="request_id",
            # Not the one that was sent: it may not stand in a log.
            request_id=uuid.uuid4().hex,
        )


def check_extras(request: GenerateRequest) -> None:
    """Raise InvalidRequest for extras out of bounds, or that contradict each other."""
    if request.grammar is not None and request.stop.ignore_eos:
        raise InvalidRequest(
            "a grammar says where the completion ends; ignore_eos would go on", field="ignore_eos"
        )
    if len(request.affinity_key) > MAX_AFFINITY_KEY_LENGTH:
        raise InvalidRequest(
            f"an affinity key has at most {MAX_AFFINITY_KEY_LENGTH} characters",
            field="affinity_key",
        )
    check_unicode(request.affinity_key, "affinity_key")
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise InvalidRequest(
            f"priority is between {-MAX_PRIORITY} and {MAX_PRIORITY}", field="priority"
        )
    if request.tools and request.messages is None:
        raise InvalidRequest("tools go with a conversation, not with a prompt", field="tools")
    if len(request.tools) > MAX_TOOLS or sum(map(len, request.tools)) > MAX_TOOLS_LENGTH:
        raise InvalidRequest(
            f"at most {MAX_TOOLS} tools of {MAX_TOOLS_LENGTH} characters in all", field="tools"
        )


def check_token_ids(token_ids: Sequence[int], vocab_size: int, field: str) -> None:
    """Raise InvalidRequest unless every token lies in [0, vocab_size)."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        bad = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(
            f"{field} has token {bad}, outside the vocabulary of {vocab_size}", field=field
        )


def check_speculation(options: SpeculationOptions, max_tree_nodes: int) -> None:
    """Raise InvalidRequest for a tree that no worker takes.

    `max_nodes` and `max_depth` are upper bounds, and a cluster may have smaller ones: only what no
    cluster could have is refused, as the client does.
    """
    for name, value in (("max_nodes", options.max_nodes), ("max_depth", options.max_depth)):
        if value is not None and not 0 <= value < MAX_TREE_NODES:
            raise InvalidRequest(
                f"{name} is between 0 and {MAX_TREE_NODES - 1}, got {value}",
                field=f"speculation.{name}",
            )
    widths = options.widths
    too_many = len(widths) >= max_tree_nodes or any(
        not 1 <= width < max_tree_nodes for width in widths
    )
    if too_many or num_nodes(widths) >= max_tree_nodes:
        raise InvalidRequest(
            f"widths are at least 1 and make a tree of at most {max_tree_nodes} nodes, "
            "its root included",
            field="speculation.widths",
        )


def completion_room(num_prompt_tokens: int, max_tokens: int | None, max_session_tokens: int) -> int:
    """Most tokens that a completion may have.

    Raises:
        InvalidRequest: the prompt, or it with `max_tokens`, is longer than a session may be.
    """
    room = max_session_tokens - num_prompt_tokens
    if num_prompt_tokens == 0:
        raise InvalidRequest("the prompt is empty", field="prompt")
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {num_prompt_tokens} tokens; a session has at most "
            f"{max_session_tokens}, one of them generated",
            field="prompt",
        )
    if max_tokens is not None and max_tokens > room:
        raise InvalidRequest(
            f"max_tokens is {max_tokens}, but after a prompt of {num_prompt_tokens} tokens only "
            f"{room} fit into a session of {max_session_tokens}",
            field="max_tokens",
        )
    return room if max_tokens is None else max_tokens
