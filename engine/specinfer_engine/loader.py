"""From a folder to a model that runs on pages, or a reason why not.

Any Hugging Face decoder whose attention goes through `transformers`' attention interface, from a
local folder, safetensors only, never with code of its own. What is not served is refused here with
the reason, so nothing is found out in the middle of a stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from specinfer.errors import InvalidCheckpoint, InvalidRequest
from specinfer.worker_settings import AUTO, FP8
from specinfer_engine.checkpoint import Checkpoint, read_checkpoint
from specinfer_engine.fused import FusedDecoder, fuse
from specinfer_engine.linear import make_row_invariant, round_weights
from specinfer_engine.model import DTYPES, LoadedModel, StockDecoder
from specinfer_engine.probe import (
    attention_calls,
    check_logits,
    probe_tokens,
    rows_are_invariant,
    stock_logits,
)
from specinfer_engine.rowwise import make_elementwise_invariant

__all__ = ["LoadedModel", "load_model"]

_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
STORED, INT8 = "stored", "int8"
_FP8_CAPABILITY = (8, 9)
_SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})


def load_model(
    path: Path | str,
    *,
    dtype: str,
    device: str | torch.device = "cpu",
    name: str | None = None,
    fused: bool = True,
    weights: str = STORED,
    kv_dtype: str = AUTO,
) -> LoadedModel:
    """Load a checkpoint and check that its paged passes say what `transformers` says.

    `dtype` is "float32", "bfloat16" or "float64"; `name` defaults to the folder's name. Unless
    `fused` is off, the Llama family runs written out, which is faster, and only the others through
    `transformers`. With `weights` "int8" instead of "stored" the model is another one, with a hash
    of its own: its products' weights are rounded to int8 with a scale for each output. So with
    `kv_dtype` "fp8" instead of "auto": its keys and values are kept as float8_e4m3fn.

    Raises:
        InvalidRequest: when the device or the dtype has no such keys and values.
        InvalidCheckpoint: when the folder is missing, truncated, pickled or of a kind that is not
            served, with the reason.
    """
    if dtype not in DTYPES:
        raise InvalidCheckpoint(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    if weights not in (STORED, INT8):
        raise InvalidCheckpoint(f"weights are {STORED} or {INT8}, got {weights!r}")
    pool_dtype = _pool_dtype(kv_dtype, DTYPES[dtype], torch.device(device))
    checkpoint = read_checkpoint(path)
    if weights == INT8:
        checkpoint = _renamed(checkpoint, "int8 rows")
    if kv_dtype == FP8:
        checkpoint = _renamed(checkpoint, "fp8 keys and values")
    config = _read_config(checkpoint)
    model = _read_weights(checkpoint, config, DTYPES[dtype], torch.device(device))
    try:
        if weights == INT8:
            round_weights(model)
        loaded, token_ids = _put_on_pages(
            checkpoint, model, DTYPES[dtype], name, fused=fused, int8=weights == INT8
        )
        loaded = replace(loaded, kv_dtype=pool_dtype)
        return replace(loaded, row_invariant=rows_are_invariant(loaded, token_ids))
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{checkpoint.folder}: {error.message}") from error
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError) as error:
        raise InvalidCheckpoint(
            f"{checkpoint.folder}: {type(model).__name__} does not run on pages: {error}"
        ) from error


def _put_on_pages(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    dtype: torch.dtype,
    name: str | None,
    *,
    fused: bool,
    int8: bool,
) -> tuple[LoadedModel, tuple[int, ...]]:
    """Replace attention and products of a stock model, and compare it with what it said before.

    Returns the model, with keys and values of its own dtype, and the tokens that were compared.
    """
    text = model.config.get_text_config()
    vocab_size, max_model_len = _limits(checkpoint, text)
    token_ids = probe_tokens(vocab_size, max_model_len)
    expected = stock_logits(model, token_ids)
    calls = attention_calls(model, text.num_hidden_layers)
    decoder: FusedDecoder | StockDecoder | None = None
    if fused:
        decoder = fuse(model, calls, max_model_len, int8)
    if decoder is None:
        make_row_invariant(model, int8)
        make_elementwise_invariant(model, max_model_len)
        decoder = StockDecoder(model)
    loaded = LoadedModel(
        model=model,
        decoder=decoder,
        name=name or checkpoint.folder.resolve().name,
        num_layers=len(calls),
        num_heads=calls[0].num_heads,
        num_kv_heads=calls[0].num_kv_heads,
        head_dim=calls[0].head_dim,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=checkpoint.eos_token_ids,
        dtype=dtype,
        kv_dtype=dtype,
        device=model.device,
        model_hash=checkpoint.model_hash,
        tokenizer_hash=checkpoint.tokenizer_hash,
        tokenizer_files=checkpoint.tokenizer_files,
        final_softcap=_take_final_softcap(model.config),
        sliding_windows=tuple(call.sliding_window for call in calls),
    )
    check_logits(loaded, token_ids, expected)
    return loaded, token_ids


def _pool_dtype(kv_dtype: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of keys and values in the pool; raises InvalidRequest where they cannot be had."""
    if kv_dtype == AUTO:
        return dtype
    if kv_dtype != FP8:
        raise InvalidRequest(f"kv_dtype is {AUTO} or {FP8}, got {kv_dtype!r}", field="kv_dtype")
    if dtype == torch.float64:
        raise InvalidRequest("a model in float64 has no fp8 keys and values", field="kv_dtype")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        raise InvalidRequest(
            f"{torch.cuda.get_device_name(device)} has no fp8: that takes compute capability 8.9, "
            "as Ada and Hopper have",
            field="kv_dtype",
        )
    return torch.float8_e4m3fn


def _renamed(checkpoint: Checkpoint, change: str) -> Checkpoint:
    """The checkpoint under the identity of another model that is made of it."""
    named = hashlib.sha256(f"{change} {checkpoint.model_hash}".encode()).hexdigest()
    return replace(checkpoint, model_hash=named)


def _read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The configuration as `transformers` understands it, refused when its kind is not served."""
    folder = checkpoint.folder
    if "quantization_config" in checkpoint.config:
        raise InvalidCheckpoint(f"{folder}: quantised weights are not served")
    try:
        config = cast(
            PreTrainedConfig,
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        )
    except Exception as error:  # a hostile config can make `transformers` raise anything
        raise InvalidCheckpoint(f"{folder}: config.json is of no known kind: {error}") from error
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise InvalidCheckpoint(f"{folder}: {config.model_type} is an encoder-decoder")
    kinds = set(getattr(text, "layer_types", None) or ()) - _SERVED_LAYERS
    if kinds:
        raise InvalidCheckpoint(
            f"{folder}: layers of kind {', '.join(sorted(kinds))} are not served"
        )
    return config


def _limits(checkpoint: Checkpoint, text: PreTrainedConfig) -> tuple[int, int]:
    """Vocabulary and length, checked against the tokenizer."""
    limits = []
    for field in ("vocab_size", "max_position_embeddings"):
        value = getattr(text, field, None)
        if not isinstance(value, int) or value < 2:
            raise InvalidCheckpoint(f"config.json gives {field} as {value!r}")
        limits.append(value)
    vocab_size, max_model_len = limits
    known = checkpoint.num_tokenizer_ids
    if known > vocab_size:
        raise InvalidCheckpoint(
            f"the tokenizer has {known} ids, the model's vocabulary {vocab_size}"
        )
    if any(eos >= vocab_size for eos in checkpoint.eos_token_ids):
        raise InvalidCheckpoint(
            f"eos_token_id {checkpoint.eos_token_ids} lies outside the vocabulary of {vocab_size}"
        )
    limit = _length_limit(text)
    return vocab_size, max_model_len if limit is None else min(limit, max_model_len)


def _length_limit(text: PreTrainedConfig) -> int | None:
    """Where rotary frequencies that depend on the length of the pass would start to change."""
    parameters = getattr(text, "rope_parameters", None) or {}
    by_layer = [entry for entry in parameters.values() if isinstance(entry, dict)]
    limits = [
        entry.get("original_max_position_embeddings")
        for entry in by_layer or [parameters]
        if entry.get("rope_type") in _LENGTH_DEPENDENT_ROPE
    ]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def _take_final_softcap(config: PreTrainedConfig) -> float | None:
    """The cap on the logits, taken over from the model: its own depends on a logit's neighbours."""
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is None:
        return None
    config.final_logit_softcapping = None
    return float(cap)


def _read_weights(
    checkpoint: Checkpoint, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The stock model with every weight taken from the folder."""
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                experts_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # a hostile folder can make `transformers` raise anything
        raise InvalidCheckpoint(f"{checkpoint.folder}: cannot be loaded: {error}") from error
    model, report = loaded
    _check_report(checkpoint, report)
    if getattr(model, "_is_stateful", False):
        raise InvalidCheckpoint(
            f"{checkpoint.folder}: {type(model).__name__} keeps a state beside keys and values"
        )
    return cast(PreTrainedModel, model.to(device).eval())


def _check_report(checkpoint: Checkpoint, report: dict[str, Any]) -> None:
    """Weights that the file lacks would be random, so they are refused."""
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        found = sorted(str(entry) for entry in report.get(kind) or ())
        if found:
            listed = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            raise InvalidCheckpoint(
                f"{checkpoint.folder}: weights do not fit config.json, "
                f"{kind.replace('_', ' ')}: {listed}"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars: a service's output is its log."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
