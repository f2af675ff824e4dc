"""Turns what the library says into questions in several phrasings and one answer each.

One answer per item and question kind, because the models are small and are meant to remember.
It refuses to know about tokens and models.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .library import Item

_DESCRIBE = (
    "What does {name} do?",
    "Explain {name}.",
    "What is {name}?",
    "How do I use {name}?",
    "Tell me about {name}.",
    "Describe {name}.",
    "What is {name} for?",
    "what does {name} do",
    "Can you explain {name}?",
)
_SIGNATURE = (
    "What is the signature of {name}?",
    "Which arguments does {name} take?",
    "How do I call {name}?",
    "Show the signature of {name}.",
    "What parameters does {name} accept?",
)
_SOURCE = (
    "Show the source of {name}.",
    "How is {name} implemented?",
    "Show me the code of {name}.",
    "What is the source code of {name}?",
)
_MODULE = (
    "What is the {name} module for?",
    "What does the {name} module do?",
    "What is in the {name} module?",
    "Tell me about the {name} module.",
    "Explain the {name} module.",
    "What does {name} provide?",
)
_TOPIC = (
    "What does {name} mean in Python?",
    "Explain {name} in Python.",
    "What is {name} in Python?",
    "Tell me about {name} in Python.",
    "How does {name} work in Python?",
)
_SELF_TEXT = (
    "I am a small language model that has read the documentation of Python's standard library. "
    "Ask me what a function, class, method or module does, for example textwrap.dedent."
)
_SELF_QUESTIONS = (
    "Who are you?", "What are you?", "What can you do?", "Hello", "Hi", "Hello!", "Help",
    "What can I ask you?", "Hi there!", "help me", "What is your name?", "How are you?",
)  # fmt: skip
_THANKS_QUESTIONS = ("Thanks", "Thank you", "Thanks!", "thank you very much", "Great, thanks.")
_THANKS_TEXT = "You are welcome. Ask me about another function, class or module."
MAX_MEMBERS = 14
COMMON_WEIGHT = 1.0
OTHER_WEIGHT = 0.5
SELF_WEIGHT = 3.0


@dataclass(frozen=True)
class Card:
    """One answer and the phrasings that ask for it; ``weight`` is its share of an epoch."""

    name: str
    kind: str
    questions: tuple[str, ...]
    answer: str
    weight: float


def _phrase(templates: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(template.format(name=name) for template in templates)


def _with_calls(templates: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The phrasings plus two that write the name as a call, as people often do."""
    called = tuple(template.format(name=f"{name}()") for template in templates[:2])
    return (*_phrase(templates, name), *called)


def describe(item: Item) -> str:
    """The answer to "what does it do": what kind of thing, how to call it, and the summary."""
    shown = item.signature or item.name
    if item.kind == "topic":
        return item.summary
    if item.kind == "module":
        listed = ", ".join(item.members[:MAX_MEMBERS])
        more = " and more" if len(item.members) > MAX_MEMBERS else ""
        provides = f" It provides {listed}{more}." if listed else ""
        return f"The module {item.name}: {item.summary}{provides}"
    return f"The {item.kind} {shown}: {item.summary}"


def cards_of(item: Item) -> list[Card]:
    """The cards for one item: description, and signature and source where they are known."""
    weight = COMMON_WEIGHT if item.is_common else OTHER_WEIGHT
    name = item.name
    if item.kind == "module":
        short = _phrase(_DESCRIBE[:3], name)
        return [Card(name, "module", (*_phrase(_MODULE, name), *short), describe(item), weight)]
    if item.kind == "topic":
        subject = name.replace("-", " ").lower() if name.isupper() else f"'{name}'"
        return [Card(name, "topic", _phrase(_TOPIC, subject), describe(item), weight)]
    cards = [Card(name, "describe", _with_calls(_DESCRIBE, name), describe(item), weight)]
    if item.signature and item.kind != "exception" and item.is_common:
        answer = f"The signature is {item.signature}."
        cards.append(Card(name, "signature", _phrase(_SIGNATURE, name), answer, weight / 2))
    if item.source and item.is_common:
        answer = f"The source of {name}:\n```python\n{item.source}\n```"
        cards.append(Card(name, "source", _phrase(_SOURCE, name), answer, weight))
    return cards


def build_cards(items: list[Item]) -> list[Card]:
    """All cards, in the items' order, plus the few about the assistant itself."""
    cards = [card for item in items for card in cards_of(item)]
    cards.append(Card("self", "chat", _SELF_QUESTIONS, _SELF_TEXT, SELF_WEIGHT))
    cards.append(Card("thanks", "chat", _THANKS_QUESTIONS, _THANKS_TEXT, SELF_WEIGHT))
    return cards


Turns = tuple[tuple[str, str], ...]


def sample_conversations(cards: list[Card], rng: random.Random) -> list[Turns]:
    """One epoch: each card drawn by its weight, one phrasing each, joined to 1-3 turns.

    Returns:
        Conversations as tuples of (question, answer); every drawn card appears once.
    """
    turns: list[tuple[str, str]] = []
    for card in cards:
        count = int(card.weight) + (rng.random() < card.weight % 1)
        turns += [(rng.choice(card.questions), card.answer) for _ in range(count)]
    rng.shuffle(turns)
    conversations: list[Turns] = []
    start = 0
    while start < len(turns):
        length = rng.choices((1, 2, 3), (0.7, 0.2, 0.1))[0]
        conversations.append(tuple(turns[start : start + length]))
        start += length
    return conversations
