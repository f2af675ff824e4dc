"""Measures a finished pair and writes its model card. Refuses to know how to train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .acceptance import Acceptance, measure_acceptance
from .distill import MAX_ANSWER, question_prompt
from .generate import generate_rows
from .questions import DEMO_QUESTIONS
from .tokenizer import END, token_id


@dataclass(frozen=True)
class Sample:
    """One demo question, the target's greedy answer, and the text it was taught (or "")."""

    question: str
    answer: str
    taught: str

    @property
    def is_exact(self) -> bool:
        """Whether the answer is what it was taught, letter by letter."""
        return bool(self.taught) and self.answer.strip() == self.taught.strip()


@dataclass(frozen=True)
class Report:
    """Everything the card states as measured. Losses are in nats per token."""

    target_parameters: int
    draft_parameters: int
    num_cards: int
    epoch_tokens: int
    target_loss: float
    draft_loss: float
    greedy: Acceptance
    sampled: Acceptance
    unseen_greedy: Acceptance
    unseen_sampled: Acceptance
    samples: tuple[Sample, ...]
    minutes: float
    machine: str


def answer_questions(
    target: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    taught: dict[str, str],
    questions: Sequence[str] = DEMO_QUESTIONS,
) -> tuple[Sample, ...]:
    """The target's greedy answers to ``questions``."""
    samples: list[Sample] = []
    end = token_id(tokenizer, END)
    for question in questions:
        prompt = question_prompt(tokenizer, question)
        (ids,) = generate_rows(
            target, [prompt], max_new=MAX_ANSWER, eos_id=end, temperature=0.0, noise=()
        )
        answer = str(tokenizer.decode(list(ids), skip_special_tokens=True))
        samples.append(Sample(question, answer, taught.get(question, "")))
    return tuple(samples)


def measure_pair(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str] = DEMO_QUESTIONS,
) -> tuple[Acceptance, Acceptance]:
    """Acceptance on ``questions``: greedy, and at temperature 0.8."""
    prompts = [question_prompt(tokenizer, question) for question in questions]
    end = token_id(tokenizer, END)
    greedy, sampled = (
        measure_acceptance(target, draft, prompts, eos_id=end, temperature=temperature)
        for temperature in (0.0, 0.8)
    )
    return greedy, sampled


def write_report(path: Path, report: Report) -> None:
    """Write the numbers as JSON, for those who want to check the card."""
    path.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")


def _acceptance_row(name: str, acceptance: Acceptance) -> str:
    depths = " | ".join(f"{share:.2f}" for share in acceptance.by_depth)
    return f"| {name} | {depths} |"


def _hit_row(name: str, acceptance: Acceptance) -> str:
    hits = " | ".join(f"{share:.3f}" for share in acceptance.top_k_hits.values())
    rounds = " | ".join(f"{mean:.2f}" for mean in acceptance.tokens_per_round.values())
    return f"| {name} | {hits} | {rounds} |"


def card_tables(report: Report) -> str:
    """The measured part of the card, in Markdown."""
    num_exact = sum(sample.is_exact for sample in report.samples)
    rows = (
        ("demo, greedy", report.greedy),
        ("demo, temperature 0.8, shared noise", report.sampled),
        ("unseen wording, greedy", report.unseen_greedy),
        ("unseen wording, temperature 0.8, shared noise", report.unseen_sampled),
    )
    return "\n".join(
        (
            "| model | parameters | final training loss |",
            "|---|---|---|",
            f"| target | {report.target_parameters:,} | {report.target_loss:.3f} nats per answer "
            "token |",
            f"| draft | {report.draft_parameters:,} | {report.draft_loss:.3f} (KL + total "
            "variation to the target) |",
            "",
            "Share of rounds of a 5-token chain in which the draft at this depth was accepted:",
            "",
            "| questions, sampling | 1 | 2 | 3 | 4 | 5 |",
            "|---|---|---|---|---|---|",
            *(_acceptance_row(name, measured) for name, measured in rows),
            "",
            "How often the target's token is among the drafter's k best, and tokens per round of "
            "a chain",
            "(the target's own token included):",
            "",
            "| questions, sampling | k=1 | k=2 | k=3 | k=4 | chain 4 | chain 5 | chain 8 |",
            "|---|---|---|---|---|---|---|---|",
            *(_hit_row(name, measured) for name, measured in rows),
            "",
            f"Greedy answers to the {len(report.samples)} demo questions that repeat the taught "
            f"text letter by letter: {num_exact}.",
        )
    )
