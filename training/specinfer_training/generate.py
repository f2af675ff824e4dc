"""Batched generation with a key/value cache in plain transformers code.

Refuses to know why text is wanted; used to collect the target's own outputs and to measure
acceptance without the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import DynamicCache, LlamaForCausalLM

Prompt = tuple[int, ...]


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Standard Gumbel noise, float32, of ``shape``."""
    uniform = torch.rand(shape, generator=generator).clamp_(1e-20, 1.0 - 1e-7)
    return -torch.log(-torch.log(uniform))


def choose(logits: torch.Tensor, temperature: float, noise: torch.Tensor | None) -> torch.Tensor:
    """Tokens [...] for ``logits`` [..., vocab]: the largest, or by the Gumbel-max trick."""
    if temperature == 0.0 or noise is None:
        return logits.argmax(-1)
    return (logits.float() / temperature + noise).argmax(-1)


def groups_by_length(prompts: Sequence[Prompt], max_rows: int) -> Iterator[list[int]]:
    """Indices of prompts of one length, so that a batch needs neither padding nor mask."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), max_rows):
            yield indices[start : start + max_rows]


@torch.inference_mode()
def generate_rows(
    model: LlamaForCausalLM,
    prompts: Sequence[Prompt],
    *,
    max_new: int,
    eos_id: int,
    temperature: float,
    noise: Sequence[torch.Tensor] | torch.Generator,
) -> list[Prompt]:
    """Continue prompts of one length.

    Args:
        noise: per row a [max_new, vocab] Gumbel tensor, or a generator to draw from; unused at
            temperature 0.

    Returns:
        Per row the new ids, with the end token where it came within ``max_new``.
    """
    vocab = model.config.vocab_size
    results: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    tokens = torch.tensor(prompts)
    cache = DynamicCache(config=model.config)
    for step in range(max_new):
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        drawn: torch.Tensor | None = None
        if temperature > 0.0 and isinstance(noise, torch.Generator):
            drawn = gumbel_noise((len(alive), vocab), noise)
        elif temperature > 0.0 and not isinstance(noise, torch.Generator):
            drawn = torch.stack([noise[row][step] for row in alive])
        chosen = choose(out.logits[:, -1], temperature, drawn).tolist()
        for row, token in zip(alive, chosen, strict=True):
            results[row].append(token)
        kept = [line for line, token in enumerate(chosen) if token != eos_id]
        if not kept:
            break
        if len(kept) < len(alive):
            cache.batch_select_indices(torch.tensor(kept))
        alive = [alive[line] for line in kept]
        tokens = torch.tensor([[chosen[line]] for line in kept])
    return [tuple(result) for result in results]
