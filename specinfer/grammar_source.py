"""A grammar in the form that llguidance compiles, and the limits on the work that this may take.

This module knows nothing of tokens, masks or sessions, and it is not for the SDK.
"""

from __future__ import annotations

import json

from llguidance import LLMatcher, LLParserLimits

from specinfer.grammar_bounds import MAX_FORCED_CHARACTERS, least_repeats, without_schemas
from specinfer.messages import Grammar

# At most one space between the tokens of JSON: a model that likes blanks still comes to an end.
_WHITESPACE = r"\x20?"
# Definitions of a few letters can spell a text of millions: any spelling of it will do there, as
# finding the tokenizer's own takes the whole of it, for every mask.
_ANY_SPELLING = '%llguidance {"no_forcing": true}\n'


def matcher_limits(grammar: Grammar, max_states: int) -> LLParserLimits:
    """Limits under which no mask takes more than some 20 ms of a core at 3,072 tokens."""
    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=8_000,
        # An object has some four for each property that may be left out; only what can be read in
        # many ways has so many in Lark, and a row's work grows faster than its items.
        max_items_in_row=600 if grammar.kind == "lark" else 2_000,
        max_grammar_size=100_000,
        max_lexer_states=max_states,
        verbose_errors=False,
    )


def source_of(grammar: Grammar) -> str:
    """The grammar in llguidance's form; raises ValueError for a schema that it does not take."""
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        own = without_schemas(grammar.text)
        long = len(own) * least_repeats(own) > MAX_FORCED_CHARACTERS
        return LLMatcher.grammar_from_lark((_ANY_SPELLING if long else "") + grammar.text)
    if grammar.kind == "choice":
        choices = (json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text))
        return LLMatcher.grammar_from_lark("start: " + " | ".join(choices))
    return LLMatcher.grammar_from_json_schema(
        grammar.text or '{"type":"object"}',
        overrides={
            "item_separator": ",",
            "key_separator": ":",
            "whitespace_pattern": _WHITESPACE,
            "coerce_one_of": False,
            "lenient": False,
        },
    )
