"""Tiny random checkpoints with a byte-level tokenizer: real folders that load in milliseconds.

A folder is a function of its arguments. Knows `transformers` and `tokenizers`, nothing of ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>")
BOS_TOKEN_ID = 1
EOS_TOKEN_ID = 4
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256
# Random weights this large give logits that differ enough to make text wander.
WEIGHT_STD = 0.12

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_tiny_llama(
    folder: Path | str,
    *,
    vocab_size: int = 512,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    max_model_len: int = 512,
    tied: bool = False,
    noise: float = 0.0,
    noise_seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random Llama of `seed` and return its folder.

    `noise` moves every weight by that share of its spread: two folders of one seed, one of them
    with a noise of 0.05 to 0.3, make a target and a drafter that often agree. `vocab_size` is at
    least SMALLEST_VOCABULARY.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_model_len,
        tie_word_embeddings=tied,
        bos_token_id=BOS_TOKEN_ID,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=0,
    )
    return write_tiny(folder, config, seed=seed, noise=noise, noise_seed=noise_seed, dtype=dtype)


def write_tiny(
    folder: Path | str,
    config: PreTrainedConfig,
    *,
    seed: int = 0,
    noise: float = 0.0,
    noise_seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random checkpoint of any decoder configuration with a tokenizer of its size."""
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, seed, WEIGHT_STD)
    if noise:
        _fill(model, noise_seed, WEIGHT_STD * noise, add=True)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(target)
    write_byte_tokenizer(target, config.get_text_config().vocab_size)
    return target


def write_byte_tokenizer(folder: Path | str, vocab_size: int) -> None:
    """Write tokenizer.json, its configuration and a chat template.

    Ids 0-4 are SPECIAL_TOKENS, the next 256 the bytes, the rest merges of two lower-case letters
    and then longer ones, so every id below `vocab_size` decodes to something.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"a byte-level vocabulary has at least {SMALLEST_VOCABULARY} tokens")
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    pieces = list(letters)
    merges: list[tuple[str, str]] = []
    for piece in pieces:
        for letter in letters:
            if len(vocabulary) < vocab_size and piece + letter not in vocabulary:
                merges.append((piece, letter))
                vocabulary[piece + letter] = len(vocabulary)
                pieces.append(piece + letter)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    target = Path(folder)
    tokenizer.save(str(target / "tokenizer.json"))
    settings: dict[str, Any] = {
        "bos_token": SPECIAL_TOKENS[BOS_TOKEN_ID],
        "eos_token": SPECIAL_TOKENS[EOS_TOKEN_ID],
        "pad_token": SPECIAL_TOKENS[0],
        "tokenizer_class": "TokenizersBackend",
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (target / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _fill(model: PreTrainedModel, seed: int, std: float, add: bool = False) -> None:
    """Put random values into every matrix, or add them; vectors only move when adding noise."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            values = torch.randn(parameter.shape, generator=generator) * std
            if add:
                parameter.add_(values)
            elif parameter.dim() > 1:
                parameter.copy_(values)
            else:
                # Biases and norm weights that differ from 0 and 1, so a lost one is seen.
                parameter.add_(values)
