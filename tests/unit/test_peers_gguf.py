"""Checkpoints written as GGUF and read back with the package's own reader."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open

from specinfer.errors import InvalidCheckpoint
from specinfer_bench.load.cluster import DEMO
from specinfer_bench.peers.gguf_file import cached_gguf, interleave_halves, write_gguf

SOURCE = DEMO / "draft"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> gguf.GGUFReader:
    return gguf.GGUFReader(write_gguf(SOURCE, tmp_path_factory.mktemp("gguf") / "draft.gguf"))


def matrix(reader: gguf.GGUFReader, name: str) -> torch.Tensor:
    """bfloat16 [rows, columns] of a stored matrix."""
    found = next(tensor for tensor in reader.tensors if tensor.name == name)
    assert found.tensor_type == gguf.GGMLQuantizationType.BF16
    return torch.from_numpy(found.data.copy()).view(torch.bfloat16)


def weight(name: str) -> torch.Tensor:
    with safe_open(SOURCE / "model.safetensors", framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
        return tensor


def test_matrices_keep_their_bits_and_norms_become_float32(written: gguf.GGUFReader) -> None:
    for name, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("blk.0.attn_output.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight"),
    ):
        assert torch.equal(matrix(written, name), weight(ours))
    norm = next(tensor for tensor in written.tensors if tensor.name == "output_norm.weight")
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    assert torch.equal(torch.from_numpy(norm.data.copy()), weight("model.norm.weight").float())
    # The demo pair ties its output to its embedding: llama.cpp does so where there is no output.
    assert not any(tensor.name == "output.weight" for tensor in written.tensors)


def test_queries_and_keys_are_in_the_order_of_neighbours(written: gguf.GGUFReader) -> None:
    config = written.fields
    heads = int(config["llama.attention.head_count"].contents())
    kv_heads = int(config["llama.attention.head_count_kv"].contents())
    for name, ours, count in (("attn_q", "q_proj", heads), ("attn_k", "k_proj", kv_heads)):
        original = weight(f"model.layers.0.self_attn.{ours}.weight")
        stored = matrix(written, f"blk.0.{name}.weight")
        assert not torch.equal(stored, original)
        half = original.shape[0] // count // 2
        # Rows i and i + d/2 of a head, which rotate together, stand side by side.
        assert torch.equal(stored[0], original[0])
        assert torch.equal(stored[1], original[half])
        assert torch.equal(stored[2], original[1])


def test_interleaving_moves_rows_within_their_head_alone() -> None:
    rows = torch.arange(8.0)[:, None]
    assert interleave_halves(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_tokenizer_goes_along(written: gguf.GGUFReader) -> None:
    fields = written.fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert tokens[:5] == ["<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert kinds[1] == gguf.TokenType.CONTROL
    assert kinds[100] == gguf.TokenType.NORMAL
    assert len(tokens) == int(fields["llama.vocab_size"].contents())
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 4
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_other_number_formats_and_a_cache_that_writes_once(tmp_path: Path) -> None:
    first = cached_gguf(SOURCE, tmp_path, "float16")
    moment = first.stat().st_mtime_ns
    assert cached_gguf(SOURCE, tmp_path, "float16").stat().st_mtime_ns == moment
    assert cached_gguf(SOURCE, tmp_path) != first
    kinds = {tensor.tensor_type for tensor in gguf.GGUFReader(first).tensors}
    assert kinds == {gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32}


def test_what_is_no_plain_llama_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InvalidCheckpoint, match="only Llamas are converted"):
        write_gguf(tmp_path, tmp_path / "out.gguf")
