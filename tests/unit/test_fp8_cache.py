"""A model of fp8 keys and values: another model than that of its dtype, and as lossless as any."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specinfer.errors import InvalidRequest
from specinfer.prefixes import hash_block, hash_key
from specinfer.sampling import SamplingParams
from specinfer_engine.batch import SequenceRows
from specinfer_engine.loader import load_model
from specinfer_engine.runner import Runner
from specinfer_engine.served import load_runner
from specinfer_kernels import reference
from specinfer_verify.settings import Settings
from specinfer_verify.worker import build_worker
from tests.kit.architectures import VOCAB_SIZE, architectures
from tests.kit.passes import Pages, prefill, random_tree
from tests.kit.table_models import random_drafter
from tests.kit.tiny_models import write_tiny, write_tiny_llama
from tests.kit.verify_driver import Job, decode, running

NUM_BLOCKS, BLOCK_SIZE, LENGTH = 160, 4, 24
FAMILIES = [("llama", True), ("qwen3", True), ("gemma3", False), ("gpt2", False)]
VOCAB = 300
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "target", vocab_size=VOCAB)


def settings(folder: Path, **changes: object) -> Settings:
    given = {"dtype": "bfloat16", "kv_dtype": "fp8", "kv_memory": 1, "block_size": 8}
    given |= {"max_rows": 64, "max_tree_nodes": 16, "profile": "off"}
    return Settings(model=folder, **(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "fused"), FAMILIES)
def test_rows_have_their_own_bits(family: str, fused: bool, dtype: str, tmp_path: Path) -> None:
    """Chunks and trees equal rows alone, and the pool has one byte for an element."""
    path = write_tiny(tmp_path, architectures()[family])
    loaded = load_model(path, dtype=dtype, fused=fused, kv_dtype="fp8")
    assert loaded.row_invariant
    runner = Runner(loaded, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    assert runner.pool.dtype == torch.float8_e4m3fn
    generator, pages = random.Random(1), Pages(NUM_BLOCKS, BLOCK_SIZE)
    context = [generator.randrange(VOCAB_SIZE) for _ in range(LENGTH)]
    alone = prefill(runner, context, pages.table(LENGTH), *range(1, LENGTH))
    table = pages.table(2 * LENGTH)
    assert torch.equal(prefill(runner, context, table), alone)
    tree = random_tree(generator, 9, VOCAB_SIZE)
    logits = runner.forward([SequenceRows.tree(tree, LENGTH, table)])[0]
    for node in (1, 4, 8):
        path_ids = [*context, *tree.path_token_ids(node)]
        plain = prefill(runner, path_ids, pages.table(LENGTH + 9), *range(1, len(path_ids)))
        assert torch.equal(logits[node], plain[-1])
    wide = replace(loaded, kv_dtype=loaded.dtype)
    exact = prefill(Runner(wide, num_blocks=NUM_BLOCKS, block_size=4), context, pages.table(24))
    error = (exact - alone).square().mean().sqrt() / exact.std()
    assert 0 < float(error) < 0.2


def test_it_is_another_model_of_half_the_bytes(folder: Path) -> None:
    """Nobody takes a session or a prefix of one for that of the other."""
    plain, small = (load_runner(settings(folder, kv_dtype=name)) for name in ("auto", "fp8"))
    assert small.num_blocks == 2 * plain.num_blocks
    assert small.pool.nbytes == plain.pool.nbytes
    hashes = {small.loaded.model_hash, plain.loaded.model_hash}
    int8 = load_model(folder, dtype="bfloat16", weights="int8", kv_dtype="fp8")
    assert len(hashes | {int8.model_hash}) == 3
    assert len({hash_block(b"", (1, 2), hash_key(name)) for name in hashes}) == 2


def divergences(folder: Path) -> int:
    """Sessions whose tokens differ between speculation on and off."""
    worker = build_worker(settings(folder))
    found = 0
    with running(worker.engine):
        for seed in range(6):
            rng = random.Random(seed)
            prompt = tuple(rng.randrange(5, VOCAB) for _ in range(3 + 7 * seed))
            sampling = SamplingParams(temperature=0.8 if seed % 2 else 0.0, seed=seed)
            job = Job(prompt, sampling, NUM_TOKENS)
            plain = decode(worker.engine, f"plain{seed}", job)
            draft = random_drafter(rng, VOCAB, known=[*prompt, *plain])
            found += decode(worker.engine, f"tree{seed}", replace(job, draft=draft)) != plain
    return found


def test_speculation_changes_no_token(folder: Path) -> None:
    assert divergences(folder) == 0


def test_negative_control_a_scale_of_the_pass(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys scaled by the largest of their pass differ with the rows that share it."""

    def planted(values: Tensor, scale: float) -> Tensor:
        largest = values.float().abs().max()
        return (values.float() / largest).to(reference.FLOAT8)

    monkeypatch.setattr(reference, "to_float8", planted)
    assert not load_model(folder, dtype="bfloat16", kv_dtype="fp8").row_invariant
    assert divergences(folder) > 0


def test_what_cannot_be_had_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequest, match="auto or fp8"):
        settings(tmp_path, kv_dtype="fp4")
    nowhere = tmp_path / "nothing"
    with pytest.raises(InvalidRequest, match="auto or fp8"):
        load_model(nowhere, dtype="float32", kv_dtype="int8")
    with pytest.raises(InvalidRequest, match="float64"):
        load_model(nowhere, dtype="float64", kv_dtype="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An old card")
    with pytest.raises(InvalidRequest, match="An old card has no fp8"):
        load_model(nowhere, dtype="bfloat16", device="cuda", kv_dtype="fp8")
