"""Measures how far a drafter agrees with a target, in plain torch code without the engine.

Accepted drafts are by definition the target's own tokens, so one teacher-forced pass of the
drafter over the target's answers tells the outcome of every round of a chain. Refuses to know
about trees on the wire and about speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

from .generate import Prompt, generate_rows, groups_by_length, gumbel_noise

CHAIN = 5
TOP_KS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Acceptance:
    """What was measured over all answers.

    ``by_depth[d]`` is the share of rounds whose drafted token at depth d + 1 was accepted along
    with all before it; ``tokens_per_round[k]`` the mean tokens a chain of k nodes gives, its own
    next token included; ``top_k_hits[k]`` the share of positions where the target's token is
    among the drafter's k best; ``num_tokens`` the answers' length in all.
    """

    by_depth: tuple[float, ...]
    tokens_per_round: dict[int, float]
    top_k_hits: dict[int, float]
    num_tokens: int


@torch.inference_mode()
def _ranks(
    draft: LlamaForCausalLM,
    prompt: Prompt,
    answer: Prompt,
    temperature: float,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    """Per answer position [num_tokens] how many tokens the drafter scores above the target's."""
    ids = torch.tensor([prompt + answer])
    logits = draft(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    scores = logits if noise is None else logits / temperature + noise[: len(answer)]
    chosen = scores.gather(1, torch.tensor(answer)[:, None])
    ranks: torch.Tensor = (scores > chosen).sum(-1)
    return ranks


def _chain_rounds(matches: Sequence[bool], chain: int) -> list[int]:
    """Accepted counts of successive rounds of a chain over one answer."""
    rounds: list[int] = []
    place = 0
    while place < len(matches):
        accepted = 0
        while accepted < chain and place + accepted < len(matches) and matches[place + accepted]:
            accepted += 1
        rounds.append(accepted)
        place += accepted + 1
    return rounds


def measure_acceptance(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    prompts: Sequence[Prompt],
    *,
    eos_id: int,
    temperature: float = 0.0,
    max_new: int = 128,
    seed: int = 0,
) -> Acceptance:
    """Answer every prompt with the target and replay the drafter over the answers.

    At a temperature above 0 both draw with the same Gumbel noise per position.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = int(target.config.vocab_size)
    all_ranks: list[torch.Tensor] = []
    for group in groups_by_length(prompts, 16):
        asked = [prompts[index] for index in group]
        noise = [gumbel_noise((max_new, vocab), generator) for _ in asked] if temperature else []
        answers = generate_rows(
            target, asked, max_new=max_new, eos_id=eos_id, temperature=temperature, noise=noise
        )
        for line, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
            drawn = noise[line] if noise else None
            all_ranks.append(_ranks(draft, prompt, answer, temperature, drawn))
    return summarise_ranks(all_ranks)


def summarise_ranks(all_ranks: Sequence[torch.Tensor]) -> Acceptance:
    """Fold per-answer rank vectors into the acceptance numbers."""
    joined = torch.cat(list(all_ranks))
    per_round: dict[int, float] = {}
    by_depth: tuple[float, ...] = ()
    for chain in (4, CHAIN, 8):
        rounds = [n for ranks in all_ranks for n in _chain_rounds((ranks == 0).tolist(), chain)]
        per_round[chain] = len(joined) / len(rounds)
        if chain == CHAIN:
            by_depth = tuple(sum(n > d for n in rounds) / len(rounds) for d in range(CHAIN))
    hits = {k: float((joined < k).float().mean()) for k in TOP_KS}
    return Acceptance(by_depth, per_round, hits, len(joined))
