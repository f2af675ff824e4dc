"""The verify engine over tiny real models: `transformers`' own output, and equality to the bit."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specinfer.sampling import SamplingParams
from specinfer_verify.engine import VerifyEngine
from specinfer_verify.settings import Settings
from specinfer_verify.worker import build_worker
from tests.kit.table_models import random_drafter
from tests.kit.tiny_models import write_tiny_llama
from tests.kit.verify_driver import Job, decode, decode_all, running

VOCAB = 300
NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "target", vocab_size=VOCAB)


def make_engine(checkpoint: Path, dtype: str, **limits: int) -> VerifyEngine:
    bounds = {"kv_blocks": 96, "block_size": 8, "max_rows": 64, "min_prefill_rows": 16}
    settings = Settings(model=checkpoint, dtype=dtype, max_tree_nodes=16, **(bounds | limits))  # type: ignore[arg-type]
    return build_worker(settings).engine


def make_prompts(num_prompts: int) -> list[tuple[int, ...]]:
    rng = random.Random(2)
    lengths = [3 + 9 * index % 61 for index in range(num_prompts)]
    return [tuple(rng.randrange(5, VOCAB) for _ in range(length)) for length in lengths]


def drafted(job: Job, output: list[int], seed: int) -> Job:
    known = [*job.prompt, *output]
    return replace(job, draft=random_drafter(random.Random(seed), VOCAB, known=known))


def test_greedy_tokens_are_those_of_transformers_in_float64(checkpoint: Path) -> None:
    stock: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    engine = make_engine(checkpoint, "float64")
    with running(engine):
        for seed, prompt in enumerate(make_prompts(4)):
            generated = stock.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                eos_token_id=None,
                pad_token_id=0,
            )
            expected = generated[0, len(prompt) :].tolist()
            job = Job(prompt, GREEDY, NUM_TOKENS)
            assert decode(engine, "plain", job) == expected
            assert decode(engine, "tree", drafted(job, expected, seed)) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speculation_company_and_preemption_change_no_bit(checkpoint: Path, dtype: str) -> None:
    samplings = [GREEDY, SAMPLED]
    jobs = [
        Job(prompt, replace(samplings[index % 2], seed=index), NUM_TOKENS)
        for index, prompt in enumerate(make_prompts(16))
    ]
    engine = make_engine(checkpoint, dtype, kv_blocks=300)
    with running(engine):
        outputs = [decode(engine, "alone", job) for job in jobs]
        speculated = [drafted(job, out, 7) for job, out in zip(jobs, outputs, strict=True)]
        assert [decode(engine, "tree", job) for job in speculated] == outputs
    assert len({tuple(output) for output in outputs}) > 12, "the outputs say something"
    crowded = make_engine(checkpoint, dtype, kv_blocks=20)
    with running(crowded):
        assert decode_all(crowded, speculated) == outputs
        assert crowded.num_preemptions > 0
        assert crowded.load().num_free_blocks == 20
