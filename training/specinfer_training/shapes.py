"""The shapes of the demo pair. Refuses to know how they are trained."""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .tokenizer import BOS, END, PAD, token_id

VOCAB_SIZE = 3072


def target_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """About 9 million parameters: wide and shallow, heads of 64 so that growing adds heads."""
    return _config(tokenizer, hidden=512, layers=4, intermediate=768, heads=8, kv_heads=2)


def draft_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """About 1.2 million parameters in two layers, because drafting pays per layer."""
    return _config(tokenizer, hidden=192, layers=2, intermediate=448, heads=3, kv_heads=1)


def _config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden: int,
    layers: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=token_id(tokenizer, BOS),
        eos_token_id=token_id(tokenizer, END),
        pad_token_id=token_id(tokenizer, PAD),
    )


def build_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A model with random float32 weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def served_copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model as it ships: a copy in bfloat16, in evaluation mode."""
    clone = copy.deepcopy(model)
    torch.nn.Module.to(clone, torch.bfloat16)
    clone.eval()
    return clone


def num_parameters(model: LlamaForCausalLM) -> int:
    """Parameters counted once where they are tied."""
    return sum(parameter.numel() for parameter in model.parameters())
