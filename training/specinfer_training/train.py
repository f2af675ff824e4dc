"""Trains one Llama on batches until a wall-clock budget ends. Refuses to know what they say.

The learning rate follows the clock: linear to zero at the budget, whatever the machine's speed.
Hidden matrices use Muon (Jordan et al., 2024), which remembers rare facts sooner; embeddings and
norms use AdamW.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from .batches import Batch

_LOG = logging.getLogger(__name__)
_WARMUP_STEPS = 30


@dataclass(frozen=True)
class TrainOptions:
    """``seconds`` is the wall-clock budget; rates are peak learning rates."""

    seconds: float
    matrix_rate: float = 0.02
    other_rate: float = 0.003
    weight_decay: float = 0.01
    save_every: float = 180.0
    log_every: int = 20


LossFunction = Callable[[torch.Tensor, Batch], torch.Tensor]


def answer_logits(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Logits [num_answers, vocab] at the batch's answer positions only."""
    hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    logits: torch.Tensor = model.lm_head(hidden.flatten(0, 1)[batch.positions])
    return logits


def label_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens."""
    return F.cross_entropy(logits.float(), batch.labels)


def build_optimisers(model: LlamaForCausalLM, options: TrainOptions) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for all else."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices,
            lr=options.matrix_rate,
            weight_decay=options.weight_decay,
            momentum=0.95,
            nesterov=True,
            adjust_lr_fn="original",
        ),
        torch.optim.AdamW(others, lr=options.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int, progress: float) -> float:
    """Share of the peak rate: a short warm-up by steps, then linear to zero by the clock."""
    return min(1.0, (step + 1) / _WARMUP_STEPS) * max(0.0, 1.0 - progress)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state beside ``path`` and rename it into place."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(
    model: LlamaForCausalLM,
    batches: Iterator[Batch],
    options: TrainOptions,
    loss_function: LossFunction = label_loss,
    state_path: Path | None = None,
    before_step: Callable[[], None] = lambda: None,
) -> float:
    """Train ``model`` in place until the budget ends; resumes from ``state_path`` when it exists.

    Args:
        batches: an endless iterator.
        loss_function: from (logits [num_answers, vocab], batch) to a scalar.
        before_step: called before every step.

    Returns:
        The running mean of the loss at the end.
    """
    optimisers = build_optimisers(model, options)
    step, spent_before, mean_loss, num_tokens = 0, 0.0, 0.0, 0
    if state_path is not None and state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        step, spent_before, mean_loss = state["step"], state["seconds"], state["loss"]
    peak_rates = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    if step:
        peak_rates = [options.matrix_rate, options.other_rate]
    model.train()
    start = last_save = time.monotonic()
    while (spent := spent_before + time.monotonic() - start) < options.seconds:
        batch = next(batches)
        before_step()
        factor = rate_factor(step, spent / options.seconds)
        for optimiser, peak in zip(optimisers, peak_rates, strict=True):
            optimiser.param_groups[0]["lr"] = peak * factor
        loss = _step(model, batch, optimisers, loss_function)
        mean_loss = loss if step == 0 else 0.97 * mean_loss + 0.03 * loss
        step += 1
        num_tokens += batch.input_ids.numel()
        if step % options.log_every == 0:
            speed = num_tokens / (time.monotonic() - start)
            _LOG.info("step %d %.0fs loss %.4f, %.0f tokens/s", step, spent, mean_loss, speed)
        if state_path is not None and time.monotonic() - last_save > options.save_every:
            save_state(state_path, _state(model, optimisers, step, spent, mean_loss))
            last_save = time.monotonic()
    if state_path is not None:
        save_state(state_path, _state(model, optimisers, step, options.seconds, mean_loss))
    model.eval()
    return mean_loss


def _step(
    model: LlamaForCausalLM,
    batch: Batch,
    optimisers: list[torch.optim.Optimizer],
    loss_function: LossFunction,
) -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = answer_logits(model, batch)
    loss = loss_function(logits, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return float(loss.detach())


def _state(
    model: LlamaForCausalLM,
    optimisers: list[torch.optim.Optimizer],
    step: int,
    seconds: float,
    loss: float,
) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "step": step,
        "seconds": seconds,
        "loss": loss,
    }
