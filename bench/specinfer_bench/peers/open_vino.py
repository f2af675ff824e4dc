"""OpenVINO GenAI: plain and with the drafter; `pip install openvino-genai` lets it take part.

It reads our GGUF, but no bfloat16 in it: weights are float16 here, computed with in the number
format that was asked for, or in float32 where the processor does not have that. Each arm is a
pipeline with weights of its own. OpenVINO keeps equal matrices once: of a grown target it reads the
blocks of zeros once for all layers, about a third less than the others. This module knows nothing
of the other engines.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from specinfer_bench.peers.gguf_file import cached_gguf
from specinfer_bench.peers.others import not_installed
from specinfer_bench.peers.peer import Answer, Arm, Pair, Task

_CHAIN = 5  # what its samples take
_PRECISIONS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_CACHE_GIB = 1


class OpenVino:
    """OpenVINO GenAI on the CPU."""

    name = "OpenVINO GenAI"

    def missing(self) -> str | None:
        """A reason unless the package is there."""
        return not_installed("openvino_genai")

    @contextmanager
    def load(self, pair: Pair) -> Iterator[Mapping[str, Arm]]:
        """Two arms; raises what the runtime raises."""
        runtime: Any = importlib.import_module("openvino_genai")
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _precision(pair.dtype),
            "INFERENCE_NUM_THREADS": pair.threads,
        }
        target, draft = (_exported(runtime, folder, pair) for folder in (pair.target, pair.draft))
        scheduler = runtime.SchedulerConfig()
        # A prompt that was seen costs the others its full price too.
        scheduler.enable_prefix_caching, scheduler.cache_size = False, _CACHE_GIB
        load = partial(
            runtime.LLMPipeline, str(target), "CPU", scheduler_config=scheduler, **options
        )
        drafted = load(draft_model=runtime.draft_model(str(draft), "CPU", **options))
        end = pair.eos_token_ids
        yield {
            "OpenVINO GenAI, plain": Arm(partial(_run, load(), end, 0), plain=True),
            "OpenVINO GenAI, drafter": Arm(partial(_run, drafted, end, _CHAIN)),
        }


def _precision(dtype: str) -> str:
    """OpenVINO's name of the format; its first token would fail in one the processor has not."""
    core: Any = importlib.import_module("openvino").Core()
    wanted = _PRECISIONS[dtype]
    here = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return wanted if wanted.upper() in {str(name).replace("FP", "F") for name in here} else "f32"


def _exported(runtime: Any, checkpoint: Path, pair: Pair) -> Path:
    """A folder with the model in OpenVINO's own form, which a drafter has to have."""
    source = cached_gguf(checkpoint, pair.cache, "float16")
    folder = source.with_suffix("")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=pair.cache) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            (made / "model.gguf").symlink_to(source)
            # It writes its form beside the file that it reads.
            runtime.LLMPipeline(str(made / "model.gguf"), "CPU", enable_save_ov_model=True)
            made.rename(folder)
    return folder


def _run(pipeline: Any, eos_token_ids: frozenset[int], num_guesses: int, task: Task) -> Answer:
    numpy: Any = importlib.import_module("numpy")
    openvino: Any = importlib.import_module("openvino")
    config = importlib.import_module("openvino_genai").GenerationConfig()
    config.max_new_tokens, config.rng_seed = task.max_tokens, task.seed
    config.eos_token_id, config.stop_token_ids = min(eos_token_ids), set(eos_token_ids)
    config.do_sample = task.temperature > 0
    if config.do_sample:
        config.temperature, config.top_k, config.top_p = task.temperature, 2**31, 1.0
    if num_guesses:
        config.num_assistant_tokens = num_guesses
    prompt = openvino.Tensor(numpy.array([task.token_ids], dtype=numpy.int64))
    begun = time.perf_counter()
    result = pipeline.generate(prompt, config)
    seconds = time.perf_counter() - begun
    token_ids = tuple(result.tokens[0])
    first = result.perf_metrics.get_ttft().mean / 1000
    return Answer(len(token_ids), seconds, token_ids, first)
