"""Tools: what is planned for them, the grammars that force calls, and finding calls in text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from specinfer.errors import InvalidRequest
from specinfer.messages import ChatMessage
from specinfer_router.gateway.tools import (
    BARE,
    MAX_TOOLS,
    TAGGED,
    FunctionTool,
    ToolChoice,
    ToolPlan,
    instructed,
    plan_tools,
)
from specinfer_router.gateway.tools_parser import (
    ArgumentsDelta,
    CallFormat,
    CallStart,
    ContentDelta,
    ToolDelta,
    ToolParser,
)

TAGGED_TEMPLATE = "{% if tools %}<tool_call>{% endif %}"
BARE_TEMPLATE = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
NO_TOOLS_TEMPLATE = "{{ messages }}"
WEATHER = FunctionTool(
    "weather",
    "Tells the weather.",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
CLOCK = FunctionTool("clock")
REQUIRED = ToolChoice("required")
CALL = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn {\\"}", "days": 2}}\n</tool_call>'
)
CLOCK_CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
BARE_CALL = '{"name": "weather", "parameters": {"city": "Bonn"}}'


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def __init__(self) -> None:
        self.eos_token_id = 0
        self.bos_token_id = None
        self.tokens = [b"<end>", *(bytes([byte]) for byte in range(256))]
        self.special_token_ids = [0]

    def __call__(self, text: bytes | str) -> list[int]:
        return [byte + 1 for byte in (text.encode() if isinstance(text, str) else text)]


def matches(plan: ToolPlan, text: str) -> bool:
    """Whether a completion satisfies the plan's grammar."""
    assert plan.grammar is not None
    assert plan.grammar.kind == "lark"
    tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(plan.grammar.text))
    assert not matcher.is_error(), matcher.get_error()
    tokens = Bytes()(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def read(
    pieces: list[str], call_format: CallFormat = TAGGED, max_calls: int = 16
) -> tuple[str, list[tuple[str, str, str]], list[ToolDelta]]:
    """Content, calls as (id, name, arguments), and all deltas."""
    parser = ToolParser(
        call_format, frozenset({"weather", "clock"}), max_calls=max_calls, call_prefix="x"
    )
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    content = ""
    calls: list[tuple[str, str, str]] = []
    for delta in deltas:
        if isinstance(delta, ContentDelta):
            content += delta.text
        elif isinstance(delta, CallStart):
            assert delta.index == len(calls)
            calls.append((delta.call_id, delta.name, ""))
        else:
            assert delta.index == len(calls) - 1
            call_id, name, arguments = calls[-1]
            calls[-1] = (call_id, name, arguments + delta.text)
    return content, calls, deltas


def test_a_template_with_tags_is_told_of_the_tools() -> None:
    plan = plan_tools([WEATHER, CLOCK], ToolChoice(), True, TAGGED_TEMPLATE)
    assert (plan.call_format, plan.grammar, plan.instruction) == (TAGGED, None, "")
    told = json.loads(plan.template_tools[0])
    assert told["type"] == "function"
    assert told["function"]["parameters"] == WEATHER.parameters
    assert json.loads(plan.template_tools[1])["function"]["parameters"]["properties"] == {}


def test_a_template_with_tools_but_no_tags_takes_bare_calls() -> None:
    assert plan_tools([WEATHER], ToolChoice(), True, BARE_TEMPLATE).call_format == BARE


def test_a_template_without_tools_can_only_be_forced() -> None:
    with pytest.raises(InvalidRequest, match="knows no tools") as refused:
        plan_tools([WEATHER], ToolChoice(), True, NO_TOOLS_TEMPLATE)
    assert refused.value.field == "tools"
    assert plan_tools([WEATHER], ToolChoice("none"), True, NO_TOOLS_TEMPLATE) == ToolPlan()
    plan = plan_tools([WEATHER], REQUIRED, True, NO_TOOLS_TEMPLATE)
    assert plan.template_tools == ()
    assert "Tells the weather." in plan.instruction
    assert matches(plan, BARE_CALL)


def test_the_instruction_joins_the_system_message() -> None:
    user = ChatMessage("user", "hi")
    assert instructed([user], "") == (user,)
    assert instructed([user], "tools") == (ChatMessage("system", "tools"), user)
    joined = instructed([ChatMessage("system", "be kind"), user], "tools")
    assert joined == (ChatMessage("system", "be kind\n\ntools"), user)


def test_forced_calls_match_their_grammar() -> None:
    plan = plan_tools([WEATHER, CLOCK], REQUIRED, True, TAGGED_TEMPLATE)
    assert matches(plan, CALL)
    assert matches(plan, f"{CALL}\n{CLOCK_CALL}")
    assert not matches(plan, "no call")
    assert not matches(plan, CALL + "and text")
    assert not matches(plan, CALL.replace("2", '"two"'))
    assert not matches(plan, CALL.replace("weather", "whether"))


def test_forced_bare_calls_match_their_grammar() -> None:
    plan = plan_tools([WEATHER], REQUIRED, True, BARE_TEMPLATE)
    assert matches(plan, BARE_CALL)
    assert matches(plan, f"{BARE_CALL}; {BARE_CALL}")
    assert not matches(plan, BARE_CALL.replace("parameters", "arguments"))


def test_one_call_where_calls_are_not_parallel() -> None:
    plan = plan_tools([WEATHER], REQUIRED, False, TAGGED_TEMPLATE)
    assert matches(plan, CALL)
    assert not matches(plan, f"{CALL}\n{CALL}")
    content, calls, _ = read([CALL, "\n", CLOCK_CALL], max_calls=1)
    assert (content, [name for _, name, _ in calls]) == ("", ["weather"])


def test_only_allowed_tools_are_called() -> None:
    plan = plan_tools([WEATHER, CLOCK], ToolChoice("required", ("clock",)), True, TAGGED_TEMPLATE)
    assert matches(plan, CLOCK_CALL)
    assert not matches(plan, CALL)
    assert len(plan.template_tools) == 2
    chosen = plan_tools([WEATHER, CLOCK], ToolChoice("auto", ("clock",)), True, TAGGED_TEMPLATE)
    assert chosen.names == {"clock"}


def test_a_strict_tool_is_held_to_its_schema_where_the_model_chooses() -> None:
    strict = FunctionTool("weather", "", WEATHER.parameters, strict=True)
    plan = plan_tools([strict], ToolChoice(), True, TAGGED_TEMPLATE)
    assert matches(plan, "It rains.")
    assert matches(plan, f"Let me see.\n{CALL}")
    assert not matches(plan, CALL.replace("2", '"two"'))
    assert plan_tools([strict], ToolChoice(), True, BARE_TEMPLATE).grammar is None


@pytest.mark.parametrize(
    ("tools", "choice", "field"),
    [
        ([FunctionTool("a b")], ToolChoice(), "tools[0]"),
        ([CLOCK, CLOCK], ToolChoice(), "tools[1]"),
        ([FunctionTool(f"t{i}") for i in range(MAX_TOOLS + 1)], ToolChoice(), "tools"),
        ([FunctionTool("a", "x" * 9000)], ToolChoice(), "tools[0]"),
        ([FunctionTool("a", "", {"type": "string"})], ToolChoice(), "tools[0]"),
        ([FunctionTool("a", "", {"description": "x" * 70_000})], ToolChoice(), "tools[0]"),
        ([], REQUIRED, "tool_choice"),
        ([CLOCK], ToolChoice("required", ("weather",)), "tool_choice"),
    ],
)
def test_bounds(tools: list[FunctionTool], choice: ToolChoice, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        plan_tools(tools, choice, True, TAGGED_TEMPLATE)
    assert refused.value.field == field


def test_deep_schemas_are_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(2000):
        schema = {"properties": {"a": schema}}
    with pytest.raises(InvalidRequest, match="nests"):
        plan_tools([FunctionTool("a", "", schema)], ToolChoice(), True, TAGGED_TEMPLATE)


def test_calls_come_out_in_order_with_their_arguments_as_they_stand() -> None:
    content, calls, deltas = read([f"Let me see.\n{CALL}\n{CLOCK_CALL}\n"])
    assert content == "Let me see.\n"
    assert calls == [
        ("call_x_0", "weather", '{"city": "Bonn {\\"}", "days": 2}'),
        ("call_x_1", "clock", "{}"),
    ]
    kinds = [type(delta) for delta in deltas]
    assert kinds == [ContentDelta, CallStart, ArgumentsDelta, CallStart, ArgumentsDelta]


def test_arguments_stream_as_they_come() -> None:
    parser = ToolParser(TAGGED, frozenset({"clock"}), max_calls=1)
    assert parser.push('<tool_call>{"name":"clock","arguments":') == []
    start, first = parser.push('{"a')
    assert isinstance(start, CallStart)
    assert first == ArgumentsDelta(0, '{"a')
    assert parser.push('":1') == [ArgumentsDelta(0, '":1')]


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "   ",
        "a <tool_call> that is none",
        " \n<tool_call> {not json}",
        '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": []}</tool_call>',
        '<tool_call>{"name": "clock", "argum',
        "<tool_cal",
        "x" * 5000 + "<tool_call>" + " " * 100,
    ],
)
def test_what_only_looks_like_a_call_is_content(text: str) -> None:
    assert read([text])[:2] == (text, [])
    assert read(list(text))[:2] == (text, [])


@pytest.mark.parametrize("text", ["{}", '{"name": "Ada"}', "; " + BARE_CALL, '{"name": 1', "x"])
def test_an_answer_in_json_is_no_bare_call(text: str) -> None:
    assert read([text], BARE)[:2] == (text, [])
    assert read(list(text), BARE)[:2] == (text, [])


def test_bare_calls_are_parted_by_semicolons() -> None:
    content, calls, _ = read([f'{BARE_CALL}; {{"name": "clock"}}'], BARE)
    assert content == ""
    assert [call[1:] for call in calls] == [("weather", '{"city": "Bonn"}'), ("clock", "{}")]
    content, calls, _ = read([BARE_CALL + "; or not"], BARE)
    assert (content, len(calls)) == ("; or not", 1)


def test_a_call_that_was_cut_off_stays_a_call() -> None:
    content, calls, _ = read([CALL[:50]])
    assert content == ""
    assert calls[0][1] == "weather"


@pytest.mark.parametrize(("plan_template", "call"), [(TAGGED_TEMPLATE, CALL), ("", BARE_CALL)])
def test_a_forced_call_that_was_cut_off_is_never_content(plan_template: str, call: str) -> None:
    plan = plan_tools([WEATHER], REQUIRED, True, plan_template)
    separator = "\n" if plan_template else "; "
    text = call + separator + call
    for length in range(len(text)):
        parser = plan.parser("x")
        deltas = [*parser.push(text[:length]), *parser.finish()]
        assert not any(isinstance(delta, ContentDelta) for delta in deltas), text[:length]


def test_calls_are_whole_once_the_arguments_of_each_have_ended() -> None:
    parser = ToolParser(TAGGED, frozenset({"weather", "clock"}), max_calls=16)
    whole = []
    for piece in (
        "Well, ",
        CALL[:50],
        CALL[50:],
        "\n<tool_call>",
        CLOCK_CALL[11:-13],
        "</tool_call>",
    ):
        parser.push(piece)
        whole.append(parser.has_whole_calls)
    assert whole == [False, False, True, True, True, True]
    parser.push(CALL[:50])
    assert (parser.num_calls, parser.has_whole_calls) == (3, False)


def test_little_is_held_back() -> None:
    parser = ToolParser(TAGGED, frozenset({"clock"}), max_calls=1)
    text = ("<tool_call>" + " " * 50 + '{"name"' + " " * 60 + ":" + " " * 60 + '"clo') * 50
    num_shown = 0
    for index, character in enumerate(text, start=1):
        for delta in parser.push(character):
            assert isinstance(delta, ContentDelta)
            num_shown += len(delta.text)
        assert index - num_shown < 700


PIECES = st.lists(
    st.sampled_from(
        [
            CALL,
            CLOCK_CALL,
            BARE_CALL,
            "<tool_call>",
            "</tool_call>",
            '{"name": "clock"',
            ', "arguments": {',
            "}",
            "; ",
            "text",
            "<",
            " ",
            " " * 40,
            "\n",
        ]
    ),
    max_size=8,
)


@given(PIECES, st.data(), st.sampled_from([TAGGED, BARE]))
def test_any_split_gives_the_same(pieces: list[str], data: st.DataObject, form: CallFormat) -> None:
    text = "".join(pieces)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=10).map(sorted))
    split = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read([text], form)[:2]
    assert read(split, form)[:2] == whole
    assert read(list(text), form)[:2] == whole
