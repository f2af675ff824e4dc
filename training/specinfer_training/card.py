"""Writes the model card of the demo pair from a report. Refuses to know how to measure."""

from __future__ import annotations

from pathlib import Path

from .report import Report, card_tables

_CARD = """\
# The demo pair

`target/` and `draft/`: two small Llama models with one tokenizer that have read the documentation
of Python's own standard library. They exist so that a fresh clone can chat, and so that
speculative decoding has a real pair to run on. They are no use as a source of facts.

## What they were taught

{num_cards:,} question cards (about {epoch_tokens:,} tokens in one pass) made from docstrings,
signatures and short function bodies of the standard library of CPython and from its language
reference (`pydoc_data.topics`), each question in several phrasings, in chats of one to three turns.
Nothing else. The target saw the cards; the drafter was distilled on the target's own answers and
on the target's view of the cards.

## Licence

The texts are part of CPython, Copyright (c) 2001 Python Software Foundation; All Rights Reserved,
under the [PSF License Version 2](https://docs.python.org/3/license.html). The models
reproduce them almost word for word, so treat the weights as a derived work under the same licence.

## How they were trained

`python -m specinfer_training --out models/demo --minutes {minutes:.0f}`
on {machine}, shared with other work. Byte-level BPE of 3,072 tokens;
Muon for matrices and AdamW for the rest; the learning rate falls to zero with the clock. Weights
are stored in bfloat16. Runs differ with the machine's speed and with the Python version whose texts
are read.

## Measured

On the bfloat16 weights as they ship, replayed in plain torch without the engine. The demo questions
(`prompts.jsonl`) are phrasings that both models were trained on, the drafter on the target's very
answers to them: those rows show a pair at its best, far above what real models reach, and speak for
the machinery, not for the method. The rows "unseen wording" ask about other names in words that no
card has ("Please say briefly what ... is good for."); the answers were still in the training data.

{tables}

## What twenty answers look like

{notes}

{samples}

## Limits

* It repeats what it has read, when asked in a wording it knows ("What does ... do?", "Explain ...",
  "How do I use ...?", "Tell me about ...", "What is the signature of ...?", "Show the source of
  ..."). In other words, or about anything else, it says fluent nonsense, and it may mix up names
  that look alike.
* Texts are cut after a few sentences; a long signature ends in `...`.
* Names are known in full only: asked what `Counter` does, without `collections.`, it answers about
  something else.
* System messages are accepted and left out of the prompt.
* English only; no code beyond short library functions; no arithmetic.
"""
_NUM_SAMPLES = 20


def _sample_lines(report: Report) -> str:
    lines: list[str] = []
    for sample in report.samples[:_NUM_SAMPLES]:
        verdict = "as taught" if sample.is_exact else "differs from what was taught"
        answer = sample.answer.strip().replace("\n", "\n  > ")
        lines.append(f"* **{sample.question}** ({verdict})\n  > {answer}")
    return "\n".join(lines)


def write_card(path: Path, report: Report, notes: str = "") -> None:
    """Write the card. ``notes`` is what a reader of the samples saw, in Markdown."""
    shown = report.samples[:_NUM_SAMPLES]
    num_exact = sum(sample.is_exact for sample in shown)
    counted = f"{num_exact} of these {len(shown)} greedy answers repeat the taught text exactly."
    text = _CARD.format(
        num_cards=report.num_cards,
        epoch_tokens=report.epoch_tokens,
        minutes=report.minutes,
        machine=report.machine,
        tables=card_tables(report),
        notes=f"{counted}\n{notes}".strip(),
        samples=_sample_lines(report),
    )
    path.write_text(text, encoding="utf-8")
