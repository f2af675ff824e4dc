"""What spans say of a generation: OpenTelemetry's GenAI names, and ours for speculation.

The names of https://opentelemetry.io/docs/specs/semconv/gen-ai/ where there is one, else
`specinfer.*`. Numbers, ids and names of models; never a prompt, a stop string, a tool or an output.
This module knows nothing of how spans are made.
"""

from __future__ import annotations

from specinfer.messages import (
    Finished,
    GenerateRequest,
    ResumeRequest,
    RoundFacts,
    SpeculationSummary,
    Started,
)
from specinfer.telemetry.traces import AttributeValue

PROVIDER = "specinfer"
MAX_DEPTHS = 64

Found = dict[str, AttributeValue]


def operation_of(request: GenerateRequest | ResumeRequest) -> str:
    """GenAI's name of what is asked for; going on with a stream is ours."""
    if isinstance(request, ResumeRequest):
        return "resume"
    return "text_completion" if request.messages is None else "chat"


def request_attributes(request: GenerateRequest | ResumeRequest, model: str = "") -> Found:
    """What is known of a request before it is served.

    Args:
        request: as it came.
        model: served name where it is known; a caller's own idea of it may be any text.
    """
    found: Found = {
        "gen_ai.operation.name": operation_of(request),
        "gen_ai.provider.name": PROVIDER,
    }
    if model:
        found["gen_ai.request.model"] = model
    if request.request_id:
        found["specinfer.request.id"] = request.request_id
    if isinstance(request, ResumeRequest):
        found["gen_ai.conversation.id"] = request.session_id
        found["specinfer.resume.offset"] = request.offset
        return found
    sampling = request.sampling
    found["gen_ai.request.temperature"] = float(sampling.temperature)
    found["gen_ai.request.top_p"] = float(sampling.top_p)
    if sampling.top_k:
        found["gen_ai.request.top_k"] = sampling.top_k
    if not request.random_seed:
        found["gen_ai.request.seed"] = sampling.seed
    if request.stop.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = request.stop.max_tokens
    return found


def started_attributes(started: Started) -> Found:
    """What is known once a session runs."""
    return {
        "gen_ai.response.id": started.session_id,
        "gen_ai.response.model": started.model,
        "gen_ai.conversation.id": started.session_id,
        "gen_ai.request.seed": started.seed,
        "gen_ai.usage.input_tokens": started.num_prompt_tokens,
    }


def finished_attributes(finished: Finished) -> Found:
    """What is known at the end: usage, and all rounds summed up."""
    return {
        "gen_ai.response.finish_reasons": (finished.reason,),
        "gen_ai.usage.input_tokens": finished.usage.num_prompt_tokens,
        "gen_ai.usage.output_tokens": finished.usage.num_completion_tokens,
        "specinfer.cached_tokens": finished.usage.num_cached_tokens,
        **_speculation(finished.speculation),
    }


def round_attributes(facts: RoundFacts) -> Found:
    """What one round did."""
    found: Found = {
        "specinfer.epoch": facts.epoch,
        "specinfer.draft_tokens": facts.num_draft_tokens,
        "specinfer.accepted_tokens": facts.num_accepted_tokens,
        "specinfer.tree.nodes": facts.num_draft_tokens + 1,
        "specinfer.tree.depth": facts.draft_depth,
    }
    if facts.root_only_reason:
        found["specinfer.root_only_reason"] = facts.root_only_reason
    return found


def _speculation(summary: SpeculationSummary) -> Found:
    found: Found = {
        "specinfer.rounds": summary.num_rounds,
        "specinfer.drafts": summary.num_drafts,
        "specinfer.draft_tokens": summary.num_draft_tokens,
        "specinfer.accepted_tokens": summary.num_accepted_tokens,
        "specinfer.accepted_tokens_per_depth": summary.num_accepted_tokens_per_pos[:MAX_DEPTHS],
    }
    for reason, count in summary.root_only_reasons:
        found[f"specinfer.root_only.{reason}"] = count
    return found
