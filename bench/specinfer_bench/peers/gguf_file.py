"""Writes a Llama checkpoint as a GGUF file, so that llama.cpp can run the same weights.

Needs the `gguf` package of the `bench` extra. Matrices keep their dtype; norms become float32,
which is what llama.cpp computes them in. This module knows nothing of llama.cpp's programs.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from specinfer.errors import InvalidCheckpoint

_TYPES = {
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.float32: gguf.GGMLQuantizationType.F32,
}
_FILE_TYPES = {
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "float32": gguf.LlamaFileType.ALL_F32,
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# In the form of GPT-2's byte-level BPE, whose regular expression the demo pair's tokenizer shares.
_PRE_TOKENIZER = "gpt-2"
_VERSION = 1  # of the files that are kept; to be raised when what is written changes


def cached_gguf(folder: Path, cache: Path, dtype: str = "") -> Path:
    """The GGUF of a checkpoint folder, written into `cache` unless it is there.

    Args:
        folder: the checkpoint.
        cache: folder for GGUF files.
        dtype: number format of the matrices; "" is the checkpoint's.

    Raises:
        InvalidCheckpoint: as `write_gguf` does.
    """
    digest = hashlib.sha256(f"{_VERSION} {folder.resolve()} {dtype}".encode())
    for file in sorted(folder.iterdir()):
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}".encode())
    target = cache / f"{folder.name}-{digest.hexdigest()[:16]}.gguf"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            made = write_gguf(folder, Path(temporary) / target.name, dtype)
            os.replace(made, target)
    return target


def write_gguf(folder: Path, target: Path, dtype: str = "") -> Path:
    """Write the Llama checkpoint in `folder` to the file `target`; returns it.

    Args:
        folder: the checkpoint.
        target: the file.
        dtype: number format of the matrices; "" is the checkpoint's.

    Raises:
        InvalidCheckpoint: when the folder holds no plain Llama of one safetensors file with a
            byte-level BPE tokenizer.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        _check(config, tokenizer)
        writer = gguf.GGUFWriter(target, "llama")
        dtype = dtype or config["dtype"]
        writer.add_file_type(_FILE_TYPES[dtype])
        _add_shape(writer, config)
        _add_tokenizer(writer, config, tokenizer)
        for name, values, kind in _tensors(folder, config, dtype):
            writer.add_tensor(name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except (OSError, ValueError, KeyError) as error:
        raise InvalidCheckpoint(f"{folder.name} cannot be written as GGUF: {error!r}") from error
    return target


def _check(config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    if config.get("model_type") != "llama":
        raise ValueError(f"only Llamas are converted, not {config.get('model_type')!r}")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError("biases are not converted")
    if config.get("rope_parameters", {}).get("rope_type", "default") != "default":
        raise ValueError("scaled rotary embeddings are not converted")
    if tokenizer["model"]["type"] != "BPE":
        raise ValueError(f"only BPE tokenizers are converted, not {tokenizer['model']['type']!r}")


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads, head_dim = config["num_attention_heads"], _head_dim(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    theta = config.get("rope_parameters", {}).get("rope_theta", config.get("rope_theta", 10000.0))
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(
    writer: gguf.GGUFWriter, config: dict[str, Any], tokenizer: dict[str, Any]
) -> None:
    size = config["vocab_size"]
    tokens = [f"[unused {token_id}]" for token_id in range(size)]
    kinds = [int(gguf.TokenType.UNUSED)] * size
    for token, token_id in tokenizer["model"]["vocab"].items():
        tokens[token_id], kinds[token_id] = token, int(gguf.TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", ()):
        tokens[added["id"]], kinds[added["id"]] = added["content"], int(gguf.TokenType.CONTROL)
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    if config.get("bos_token_id") is not None:
        writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(_first(config["eos_token_id"]))
    # The chat template writes the begin token where there is to be one.
    writer.add_add_bos_token(False)


def _first(token_ids: int | list[int]) -> int:
    return token_ids if isinstance(token_ids, int) else token_ids[0]


def _tensors(
    folder: Path, config: dict[str, Any], dtype: str
) -> Iterator[tuple[str, NDArray[Any], gguf.GGMLQuantizationType]]:
    """Name, bytes or values, and type of each tensor, as llama.cpp expects them."""
    heads = config["num_attention_heads"]
    groups = {"q_proj": heads, "k_proj": config.get("num_key_value_heads", heads)}
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  it is no mapping
            tensor: Tensor = opened.get_tensor(name)
            num_heads = groups.get(name.split(".")[-2])
            if num_heads is not None:
                tensor = interleave_halves(tensor, num_heads)
            tensor = tensor.to(torch.float32 if tensor.dim() == 1 else getattr(torch, dtype))
            kind = _TYPES[tensor.dtype]
            yield _gguf_name(name), _as_numpy(tensor), kind


def interleave_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection in llama.cpp's order.

    Hugging Face rotates row i of a head together with row i + d/2, llama.cpp neighbours.

    Args:
        weight: [num_heads * head_dim, columns], any dtype.
        num_heads: heads of the projection.
    """
    rows, columns = weight.shape
    halves = weight.view(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def _as_numpy(tensor: Tensor) -> NDArray[Any]:
    if tensor.dtype == torch.bfloat16:
        # numpy has no bfloat16: the writer takes raw bytes, the last axis in bytes.
        return tensor.contiguous().view(torch.uint8).numpy()
    values: NDArray[np.generic] = tensor.contiguous().numpy()
    return values


def _gguf_name(name: str) -> str:
    base, suffix = name.rsplit(".", 1)
    if base in _NAMES:
        return f"{_NAMES[base]}.{suffix}"
    _, _, layer, part = base.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.{suffix}"


def _head_dim(config: dict[str, Any]) -> int:
    head_dim: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return head_dim
