"""Runs all stages in order, from the library's texts to the exported pair and its card.

Refuses to know flags. A work folder keeps what each stage left, so that a broken run goes on.
"""

from __future__ import annotations

import logging
import os
import platform
import random
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaForCausalLM

from .card import write_card
from .corpus import Card, sample_conversations
from .export import export_model
from .questions import UNSEEN_QUESTIONS, write_questions
from .report import Report, answer_questions, measure_pair, write_report
from .shapes import num_parameters, served_copy
from .stages import Material, prepare, train_draft, train_target
from .tokenizer import encode_chat

_LOG = logging.getLogger(__name__)
TARGET_SHARE = 0.6
DRAFT_SHARE = 0.4


@dataclass(frozen=True)
class PipelineOptions:
    """``out`` is the folder of the pair, ``work`` keeps states, ``minutes`` is the budget."""

    out: Path
    work: Path
    minutes: float


def taught_answers(cards: list[Card]) -> dict[str, str]:
    """Every phrasing and the answer it was taught."""
    return {question: card.answer for card in reversed(cards) for question in card.questions}


def epoch_tokens(material: Material) -> int:
    """Tokens in one sampled epoch."""
    turns = sample_conversations(material.cards, random.Random(0))
    return sum(len(encode_chat(material.tokenizer, one).ids) for one in turns)


def describe_machine() -> str:
    """Kind of machine, without its name."""
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU"


def run_pipeline(options: PipelineOptions) -> Report:
    """Train, distil, measure and export the pair within about ``options.minutes``."""
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    seconds = options.minutes * 60.0
    material = prepare(options.work)
    target, target_loss = train_target(material, options.work, seconds * TARGET_SHARE)
    export_model(target, material.tokenizer, options.out / "target")
    draft, draft_loss = train_draft(material, target, options.work, seconds * DRAFT_SHARE)
    export_model(draft, material.tokenizer, options.out / "draft")
    served, drafter = served_copy(target), served_copy(draft)
    report = build_report(material, (served, drafter), (target_loss, draft_loss), options.minutes)
    write_report(options.work / "report.json", report)
    write_questions(options.out / "prompts.jsonl")
    write_card(options.out / "README.md", report)
    _LOG.info("pair written to %s", options.out)
    return report


def build_report(
    material: Material,
    pair: tuple[LlamaForCausalLM, LlamaForCausalLM],
    losses: tuple[float, float],
    minutes: float,
) -> Report:
    """Measure a finished pair (target, drafter), as it ships, and say how it was made."""
    target, draft = pair
    greedy, sampled = measure_pair(target, draft, material.tokenizer)
    unseen = measure_pair(target, draft, material.tokenizer, UNSEEN_QUESTIONS)
    return Report(
        target_parameters=num_parameters(target),
        draft_parameters=num_parameters(draft),
        num_cards=len(material.cards),
        epoch_tokens=epoch_tokens(material),
        target_loss=losses[0],
        draft_loss=losses[1],
        greedy=greedy,
        sampled=sampled,
        unseen_greedy=unseen[0],
        unseen_sampled=unseen[1],
        samples=answer_questions(target, material.tokenizer, taught_answers(material.cards)),
        minutes=minutes,
        machine=describe_machine(),
    )
