"""Trains the byte-level BPE tokenizer of the demo pair and turns conversations into ids.

Refuses to know about models. A system message is accepted by the template and left out of the
text, because the models never saw one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .corpus import Card, Turns

PAD, BOS, USER, ASSISTANT, END = "<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS = (PAD, BOS, USER, ASSISTANT, END)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocab_size`` tokens with a chat template; end is EOS."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_texts(cards: list[Card]) -> Iterable[str]:
    """What the tokenizer learns from: every answer, and one question per card."""
    for card in cards:
        yield card.answer
        yield card.questions[0]


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one token of the vocabulary, such as a special token."""
    found = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int):
        raise TypeError(f"{token!r} is not one token")
    return found


def text_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of plain text, without special tokens around it."""
    return [int(value) for value in tokenizer.encode(text, add_special_tokens=False)]


@dataclass(frozen=True)
class Chat:
    """A conversation as ids; ``is_answer[i]`` says that ``ids[i]`` is to be predicted."""

    ids: tuple[int, ...]
    is_answer: tuple[bool, ...]


def single_turn(ids: tuple[int, ...], start: int) -> Chat:
    """A chat of one prompt and its answer, which begins at ``start``."""
    return Chat(ids, (False,) * start + (True,) * (len(ids) - start))


def encode_chat(tokenizer: PreTrainedTokenizerFast, turns: Turns) -> Chat:
    """The ids the chat template would give, with the answers (and their ends) marked."""
    ids, marks = [token_id(tokenizer, BOS)], [False]
    for question, answer in turns:
        asked = [*text_ids(tokenizer, question), token_id(tokenizer, ASSISTANT)]
        asked.insert(0, token_id(tokenizer, USER))
        said = [*text_ids(tokenizer, answer), token_id(tokenizer, END)]
        ids += [*asked, *said]
        marks += [False] * len(asked) + [True] * len(said)
    return Chat(tuple(ids), tuple(marks))
