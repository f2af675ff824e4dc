"""`transformers` generate: plain, with the drafter as assistant, and with prompt lookup.

With its own defaults for how much to guess; one thread pool of this process runs all three. This
module knows nothing of the other engines.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specinfer.errors import InvalidCheckpoint
from specinfer_bench.peers.peer import Answer, Arm, Pair, Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_LOOKUP_TOKENS = 10  # what its documentation takes


class Transformers:
    """Hugging Face's own loop on its own modules."""

    name = "transformers"

    def missing(self) -> str | None:
        """Always there: we stand on the same package."""
        return None

    @contextmanager
    def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
        """Three arms; raises InvalidCheckpoint."""
        # Here and not above: who runs the engine apart need not wait seconds for its import.
        import torch
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(pair.threads)
        target, draft = (_load(folder, pair) for folder in (pair.target, pair.draft))
        lookup = {"prompt_lookup_num_tokens": _LOOKUP_TOKENS}
        yield {
            "transformers, plain": Arm(partial(_run, target, {}), plain=True),
            "transformers, assisted": Arm(partial(_run, target, {"assistant_model": draft})),
            "transformers, prompt lookup": Arm(partial(_run, target, lookup)),
        }


class _FirstToken:
    """Notes when the first tokens after the prompt come."""

    def __init__(self) -> None:
        self.moment: float | None = None
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then new tokens."""
        if self._seen_prompt and self.moment is None:
            self.moment = time.perf_counter()
        self._seen_prompt = True

    def end(self) -> None:
        """Nothing is left to do."""


def _load(folder: Path, pair: Pair) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, pair.dtype), local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"transformers cannot load {folder.name}: {error}") from error
    evaluated: PreTrainedModel = model.to(pair.device).eval()
    return evaluated


def _run(model: Any, options: Mapping[str, Any], task: Task) -> Answer:
    import torch

    torch.manual_seed(task.seed)
    sampled: dict[str, Any] = {"do_sample": False}
    if task.temperature > 0:
        sampled = {"do_sample": True, "temperature": task.temperature, "top_k": 0, "top_p": 1.0}
    prompt, streamer = torch.tensor([task.token_ids], device=model.device), _FirstToken()
    begun = time.perf_counter()
    with torch.inference_mode():
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=task.max_tokens,
            streamer=streamer,
            **sampled,
            **options,
        )
    ended = time.perf_counter()
    token_ids = tuple(generated[0, len(task.token_ids) :].tolist())
    return Answer(len(token_ids), ended - begun, token_ids, (streamer.moment or ended) - begun)
