"""What users ask of routers."""

from __future__ import annotations

from dataclasses import dataclass, field

from specinfer.messages.workers import Grammar
from specinfer.sampling import SamplingParams, StopConditions


@dataclass(frozen=True)
class SpeculationOptions:
    """How one request wants to be speculated on; none of it changes a token.

    Attributes:
        enabled: False decodes plainly, a pass of the target for each token.
        max_nodes: most guessed tokens a round; None leaves it to the cluster.
        max_depth: deepest guess; None leaves it to the cluster.
        widths: SpecInfer's <k1,...,km>; empty leaves the shape to the cluster.
    """

    enabled: bool = True
    max_nodes: int | None = None
    max_depth: int | None = None
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool; `arguments` is JSON."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation, such as ("user", "What does textwrap.dedent do?").

    Attributes:
        role: who speaks: "system", "user", "assistant" or "tool".
        content: what is said.
        name: of the speaker, or of the tool that answers, or "".
        tool_call_id: call that a tool's answer belongs to, or "".
        tool_calls: calls that the assistant made.
    """

    role: str
    content: str
    name: str = ""
    tool_call_id: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class GenerateRequest:
    """One user call, in exactly one of three input forms.

    Attributes:
        prompt: text to continue, or None.
        token_ids: tokens to continue, or None.
        messages: a conversation that the model's chat template turns into a prompt, or None.
        model: served name; "" takes the cluster's model.
        sampling: how tokens are drawn; `seed` is ignored when `random_seed` is set.
        random_seed: let the router choose a seed; it comes back in Started.
        stop: when the stream ends.
        num_logprobs: most probable tokens to report with each token; None reports no logprobs.
        speculation: how to speculate.
        request_id: the caller's id; "" lets the router choose.
        tools: tools that the chat template tells the model of, one JSON object each.
        grammar: what the completion has to match, or None.
        prediction: text that the completion is expected to be like, or ""; it is guessed from.
        affinity_key: requests with the same key go to the same verify worker where its load
            allows; "" goes to the least loaded.
        priority: among requests that wait, higher ones start first.
        detail: send each round's tree with its texts along.
    """

    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    model: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    random_seed: bool = False
    stop: StopConditions = field(default_factory=StopConditions)
    num_logprobs: int | None = None
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)
    request_id: str = ""
    tools: tuple[str, ...] = ()
    grammar: Grammar | None = None
    prediction: str = ""
    affinity_key: str = ""
    priority: int = 0
    detail: bool = False


@dataclass(frozen=True)
class ResumeRequest:
    """Asks for the rest of a stream that broke.

    Attributes:
        session_id: from the stream's Started event.
        offset: tokens of the completion that the caller has.
        request_id: the caller's id; "" keeps that of the request.
    """

    session_id: str
    offset: int = 0
    request_id: str = ""
