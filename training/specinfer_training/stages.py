"""The stages of training the demo pair, each resumable from the files it leaves in a work folder.

Refuses to know about flags and model cards.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .batches import Batch, iter_batches
from .corpus import Card, build_cards, sample_conversations
from .distill import (
    Labels,
    collect_outputs,
    endless_batches,
    join_chats,
    label_chats,
    loss_from_labels,
)
from .library import read_library
from .shapes import (
    VOCAB_SIZE,
    build_model,
    draft_config,
    num_parameters,
    served_copy,
    target_config,
)
from .threads import SpareThreads
from .tokenizer import (
    PAD,
    Chat,
    encode_chat,
    single_turn,
    token_id,
    tokenizer_texts,
    train_tokenizer,
)
from .train import TrainOptions, train

_LOG = logging.getLogger(__name__)
BATCH_TOKENS = 4608
# Smaller for the drafter: its steps are cheap, and more of them teach more in the same time.
DRAFT_BATCH_TOKENS = 2304


@dataclass(frozen=True)
class Material:
    """What every stage needs: the cards and the tokenizer."""

    cards: list[Card]
    tokenizer: PreTrainedTokenizerFast


def prepare(work: Path) -> Material:
    """Build the cards; train the tokenizer, or read it back from ``work``."""
    cards = build_cards(read_library())
    folder = work / "tokenizer"
    if not folder.exists():
        tokenizer = train_tokenizer(tokenizer_texts(cards), VOCAB_SIZE)
        tokenizer.save_pretrained(folder)
    return Material(cards, PreTrainedTokenizerFast.from_pretrained(folder))


def corpus_batches(material: Material, rng: random.Random, max_tokens: int) -> Iterator[Batch]:
    """Endless batches, a freshly sampled epoch after each pass."""
    pad_id = token_id(material.tokenizer, PAD)
    while True:
        turns = sample_conversations(material.cards, rng)
        chats = [encode_chat(material.tokenizer, one) for one in turns]
        num_tokens = sum(len(chat.ids) for chat in chats)
        _LOG.info("epoch of %d conversations, %d tokens", len(chats), num_tokens)
        yield from iter_batches(chats, max_tokens, pad_id, rng)


def train_target(material: Material, work: Path, seconds: float) -> tuple[LlamaForCausalLM, float]:
    """The target, trained on the corpus; returns it with its running loss (nats per token)."""
    model = build_model(target_config(material.tokenizer), seed=0)
    _LOG.info("target of %d parameters, %.0f s", num_parameters(model), seconds)
    # Unseeded: the clock already makes runs differ, and a resumed run must see new phrasings.
    batches = corpus_batches(material, random.Random(), BATCH_TOKENS)
    options = TrainOptions(seconds=seconds)
    loss = train(model, batches, options, state_path=work / "target.pt", before_step=SpareThreads())
    return model, loss


def gather_outputs(
    material: Material, target: LlamaForCausalLM, path: Path, seconds: float, rng: random.Random
) -> list[Chat]:
    """The target's own outputs; kept at ``path``, one JSON line of ids and prompt length each."""
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [single_turn(tuple(ids), start) for ids, start in rows]
    chats = collect_outputs(target, material.tokenizer, material.cards, seconds, rng)
    lines = [json.dumps([chat.ids, chat.is_answer.index(True)]) for chat in chats]
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(path)
    return chats


def _labelled(
    material: Material, target: LlamaForCausalLM, outputs: list[Chat], rng: random.Random
) -> tuple[list[Chat], list[Labels]]:
    """The outputs joined to conversations, and one epoch of the corpus, with the target's view."""
    corpus = sample_conversations(material.cards, rng)
    chats = join_chats(outputs, rng)
    chats += [encode_chat(material.tokenizer, turns) for turns in corpus]
    pad_id = token_id(material.tokenizer, PAD)
    return chats, label_chats(target, chats, pad_id, BATCH_TOKENS)


def train_draft(
    material: Material, target: LlamaForCausalLM, work: Path, seconds: float
) -> tuple[LlamaForCausalLM, float]:
    """The drafter, distilled on the target's own outputs and on the corpus.

    A fifth of ``seconds`` goes to collecting outputs, a twentieth is left for labelling.
    Returns the drafter and its running loss.
    """
    rng = random.Random(1)
    served = served_copy(target)
    outputs = gather_outputs(material, served, work / "outputs.jsonl", seconds / 5, rng)
    chats, labels = _labelled(material, served, outputs, rng)
    pad_id = token_id(material.tokenizer, PAD)
    model = build_model(draft_config(material.tokenizer), seed=0)
    _LOG.info("drafter of %d parameters", num_parameters(model))
    batches = endless_batches(chats, DRAFT_BATCH_TOKENS, pad_id, rng)
    options = TrainOptions(seconds=seconds * 0.75)
    loss = train(
        model, batches, options, loss_from_labels(labels), work / "draft.pt", SpareThreads()
    )
    return model, loss
