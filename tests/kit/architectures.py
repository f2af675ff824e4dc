"""Tiny configurations of every decoder family that the engine promises to serve.

Windows are shorter than the tests' contexts and caps low enough to bend the scores.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 300
WINDOW = 5

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "pad_token_id": 0,
}
_SHAPE: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_OWN_HEAD: dict[str, Any] = {**_SHAPE, "head_dim": 16}
_MIXED_LAYERS: dict[str, Any] = {
    **_OWN_HEAD,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 4,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "tie_word_embeddings": False}


def architectures() -> dict[str, PreTrainedConfig]:
    """A configuration for each family, by name."""
    return {
        "llama": LlamaConfig(**_SHAPE),
        "mistral": MistralConfig(**_SHAPE, sliding_window=WINDOW),
        "qwen2": Qwen2Config(
            **_SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
        ),
        "qwen3": Qwen3Config(**_OWN_HEAD),
        "gemma": GemmaConfig(**_OWN_HEAD),
        "gemma2": Gemma2Config(
            **_MIXED_LAYERS,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=16,
        ),
        "gemma3": Gemma3TextConfig(**_MIXED_LAYERS, query_pre_attn_scalar=16),
        "phi": PhiConfig(**_SHAPE),
        "phi3": Phi3Config(**_SHAPE, sliding_window=WINDOW),
        "gpt2": GPT2Config(**_GPT2),
        "opt": OPTConfig(
            **_COMMON,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        ),
        "gpt_neox": GPTNeoXConfig(
            **_COMMON,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
        "olmo2": Olmo2Config(**_SHAPE),
        "granite": GraniteConfig(
            **_SHAPE,
            logits_scaling=1.7,
            embedding_multiplier=2.0,
            residual_multiplier=0.8,
            attention_multiplier=0.3,
        ),
        "mixtral": MixtralConfig(**_SHAPE, **_EXPERTS, num_local_experts=4, sliding_window=WINDOW),
        "qwen3_moe": Qwen3MoeConfig(
            **_OWN_HEAD, **_EXPERTS, num_experts=4, moe_intermediate_size=24
        ),
    }
