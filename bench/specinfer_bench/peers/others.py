"""vLLM and SGLang: run where they are installed, skipped with the reason where not.

Each needs another PyTorch than ours, so neither is a dependency, and neither was installed where
this was written: these adapters follow the packages' documentation and have not run. One that
fails leaves the comparison with its message. This module knows nothing of the other engines.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from specinfer_bench.peers.peer import Answer, Arm, Pair, Task

_CHAIN = 5


class Vllm:
    """vLLM, plain and with the drafter; each of the two is an engine with its own weights."""

    name = "vLLM"

    def missing(self) -> str | None:
        """A reason unless the package is there."""
        return not_installed("vllm")

    @contextmanager
    def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
        """Two arms; raises what vLLM raises."""
        vllm: Any = importlib.import_module("vllm")
        drafted = {"model": str(pair.draft), "num_speculative_tokens": _CHAIN}
        engines = {
            name: vllm.LLM(
                model=str(pair.target),
                dtype=pair.dtype,
                enable_prefix_caching=False,
                max_model_len=2048,
                speculative_config=speculative,
            )
            for name, speculative in (("vLLM, plain", None), ("vLLM, drafter", drafted))
        }
        yield {
            name: Arm(partial(_run_vllm, vllm, engine), plain=name.endswith("plain"))
            for name, engine in engines.items()
        }


def _run_vllm(vllm: Any, engine: Any, task: Task) -> Answer:
    sampling = vllm.SamplingParams(
        max_tokens=task.max_tokens, temperature=task.temperature, seed=task.seed
    )
    begun = time.perf_counter()
    (result,) = engine.generate(
        [{"prompt_token_ids": list(task.token_ids)}], sampling, use_tqdm=False
    )
    seconds = time.perf_counter() - begun
    token_ids = tuple(result.outputs[0].token_ids)
    return Answer(len(token_ids), seconds, token_ids)


class Sglang:
    """SGLang, plain."""

    name = "SGLang"

    def missing(self) -> str | None:
        """A reason unless the package is there."""
        return not_installed("sglang")

    @contextmanager
    def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
        """One arm; raises what SGLang raises."""
        sglang: Any = importlib.import_module("sglang")
        engine = sglang.Engine(
            model_path=str(pair.target), dtype=pair.dtype, disable_radix_cache=True
        )
        try:
            yield {"SGLang, plain": Arm(partial(_run_sglang, engine), plain=True)}
        finally:
            engine.shutdown()


def _run_sglang(engine: Any, task: Task) -> Answer:
    sampling = {"max_new_tokens": task.max_tokens, "temperature": task.temperature}
    begun = time.perf_counter()
    result = engine.generate(input_ids=list(task.token_ids), sampling_params=sampling)
    seconds = time.perf_counter() - begun
    token_ids = tuple(result["output_ids"])
    return Answer(len(token_ids), seconds, token_ids)


def not_installed(module: str) -> str | None:
    """A reason when the module cannot be imported here, told without importing it."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"the package {module} is not installed"
