"""Collects the target's own outputs and trains the drafter to agree with the target on them.

The loss is forward KL (Hinton et al., 2015; DistillSpec, Zhou et al., 2023) plus total variation,
which is one minus the acceptance rate of sampled speculation. The target's distribution is kept
as its largest entries and one bucket for the rest. Refuses to know the engine.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .batches import Batch, collate, iter_batches
from .corpus import Card
from .generate import Prompt, generate_rows, groups_by_length
from .tokenizer import ASSISTANT, BOS, END, USER, Chat, single_turn, text_ids, token_id
from .train import LossFunction, answer_logits

_LOG = logging.getLogger(__name__)
NUM_KEPT = 16
MAX_ANSWER = 200
_ROWS = 96


@dataclass(frozen=True)
class Labels:
    """The target's view of one chat's answer positions.

    ``tokens`` [num_answers, NUM_KEPT] int16 and ``log_probs`` of the same shape, float16.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor


def question_prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> Prompt:
    """The ids of one question, up to where the answer starts."""
    before = (token_id(tokenizer, BOS), token_id(tokenizer, USER))
    return (*before, *text_ids(tokenizer, question), token_id(tokenizer, ASSISTANT))


def collect_outputs(
    target: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    cards: Sequence[Card],
    seconds: float,
    rng: random.Random,
) -> list[Chat]:
    """Answers of the target to questions drawn from all cards, until the budget ends.

    Passes alternate between greedy and temperature 0.8, each with one phrasing per card; after
    the first pass only cards of full weight are asked, because they are asked most in practice.
    """
    deadline = time.monotonic() + seconds
    noise = torch.Generator().manual_seed(rng.randrange(2**31))
    eos_id = token_id(tokenizer, END)
    chats: list[Chat] = []
    turn = 0
    while time.monotonic() < deadline:
        temperature = (0.0, 0.8)[turn % 2]
        turn += 1
        asked_cards = [card for card in cards if turn == 1 or card.weight >= 1.0]
        prompts = [question_prompt(tokenizer, rng.choice(card.questions)) for card in asked_cards]
        groups = list(groups_by_length(prompts, _ROWS))
        rng.shuffle(groups)
        for group in groups:
            if time.monotonic() > deadline:
                break
            asked = [prompts[index] for index in group]
            answers = generate_rows(
                target,
                asked,
                max_new=MAX_ANSWER,
                eos_id=eos_id,
                temperature=temperature,
                noise=noise,
            )
            for prompt, answer in zip(asked, answers, strict=True):
                chats.append(single_turn(prompt + answer, len(prompt)))
        _LOG.info("%d outputs after pass %d (temperature %.1f)", len(chats), turn, temperature)
    return chats


def join_chats(chats: Sequence[Chat], rng: random.Random) -> list[Chat]:
    """Shuffle single-turn chats and join them to conversations of one to three turns."""
    order = list(chats)
    rng.shuffle(order)
    joined: list[Chat] = []
    start = 0
    while start < len(order):
        length = rng.choices((1, 2, 3), (0.8, 0.14, 0.06))[0]
        parts = order[start : start + length]
        ids = parts[0].ids + tuple(token for part in parts[1:] for token in part.ids[1:])
        marks = parts[0].is_answer + tuple(m for part in parts[1:] for m in part.is_answer[1:])
        joined.append(Chat(ids, marks))
        start += length
    return joined


@torch.inference_mode()
def label_chats(
    target: LlamaForCausalLM, chats: Sequence[Chat], pad_id: int, max_tokens: int
) -> list[Labels]:
    """The target's largest log-probabilities at every answer position of every chat."""
    order = sorted(range(len(chats)), key=lambda row: len(chats[row].ids))
    results: dict[int, Labels] = {}
    start = 0
    while start < len(order):
        count = max(1, max_tokens // len(chats[order[min(start + 8, len(order) - 1)]].ids))
        rows = order[start : start + count]
        start += count
        batch = collate(chats, rows, pad_id)
        log_probs = answer_logits(target, batch).float().log_softmax(-1)
        kept = log_probs.topk(NUM_KEPT, dim=-1)
        sizes = [sum(chats[row].is_answer) for row in rows]
        pieces = zip(kept.indices.split(sizes), kept.values.split(sizes), strict=True)
        for row, (tokens, values) in zip(rows, pieces, strict=True):
            results[row] = Labels(tokens.to(torch.int16), values.to(torch.float16))
    return [results[row] for row in range(len(chats))]


def agreement_loss(
    logits: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor
) -> torch.Tensor:
    """Mean forward KL plus total variation over the kept entries and the rest.

    Args:
        logits: [num_answers, vocab] of the drafter.
        tokens: [num_answers, kept] int64.
        log_probs: [num_answers, kept] float32 of the target at ``tokens``.
    """
    ours = logits.float().log_softmax(-1).gather(1, tokens)
    p, q = log_probs.exp(), ours.exp()
    p_rest = (1.0 - p.sum(-1)).clamp(min=1e-6)
    q_rest = (1.0 - q.sum(-1)).clamp(min=1e-6)
    divergence = (p * (log_probs - ours)).sum(-1) + p_rest * (p_rest.log() - q_rest.log())
    variation = 0.5 * ((p - q).abs().sum(-1) + (p_rest - q_rest).abs())
    return (divergence + variation).mean()


def loss_from_labels(labels: Sequence[Labels]) -> LossFunction:
    """A loss that looks its targets up by the batch's row numbers."""

    def loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        tokens = torch.cat([labels[row].tokens for row in batch.rows]).long()
        log_probs = torch.cat([labels[row].log_probs for row in batch.rows]).float()
        return agreement_loss(logits, tokens, log_probs)

    return loss


def endless_batches(
    chats: Sequence[Chat], max_tokens: int, pad_id: int, rng: random.Random
) -> Iterator[Batch]:
    """The same chats again and again, in new order."""
    while True:
        _LOG.info("pass over %d labelled chats", len(chats))
        yield from iter_batches(chats, max_tokens, pad_id, rng)
