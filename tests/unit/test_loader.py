"""What is not a whole checkpoint of a kind that is served is refused at load, with the reason."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3NextConfig,
    StableLmConfig,
)

from specinfer.errors import InvalidCheckpoint
from specinfer_engine import checkpoint
from specinfer_engine.loader import load_model
from specinfer_kernels import decoder_logits, tree_attention
from tests.kit.architectures import architectures
from tests.kit.tiny_models import CHAT_TEMPLATE, write_tiny, write_tiny_llama

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 4,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that loads."""
    return write_tiny_llama(tmp_path / "llama", vocab_size=300, hidden_size=32, num_layers=1)


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02never read")


def index_of(*names: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        weight_map = {f"tensor{index}": name for index, name in enumerate(names)}
        content = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(content)

    return write


def config_with(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def overwrite(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


FAULTS: list[tuple[str, Callable[[Path], None], str]] = [
    ("no config", remove("config.json"), r"config\.json is missing"),
    ("no JSON", overwrite("config.json", "{"), "is not JSON"),
    ("no object", overwrite("config.json", "[]"), "no JSON object"),
    ("unknown kind", config_with(model_type="nonesuch"), "no known kind"),
    (
        "code of its own",
        config_with(model_type="nonesuch", auto_map={"AutoConfig": "evil.Evil"}),
        "no known kind",
    ),
    ("encoder-decoder", config_with(is_encoder_decoder=True), "encoder-decoder"),
    ("quantised", config_with(quantization_config={"quant_method": "gptq"}), "quantised"),
    ("absurd shape", config_with(num_attention_heads=-3), "no known kind|cannot be loaded"),
    ("wrong shape", config_with(intermediate_size=80), "do not fit|cannot be loaded"),
    ("no length", config_with(max_position_embeddings=0), "max_position_embeddings as 0"),
    ("no weights", remove("model.safetensors"), r"model\.safetensors is missing"),
    ("pickled", pickle_weights, "pickled"),
    ("truncated", cut_weights, "truncated"),
    ("empty file", overwrite("model.safetensors", ""), "truncated"),
    ("no safetensors", overwrite("model.safetensors", "x" * 999), "truncated or no safetensors"),
    ("missing shard", index_of("model-00001-of-00002.safetensors"), "00002.* is missing"),
    ("shard elsewhere", index_of("../model.safetensors"), "not a shard"),
    ("pickled shard", index_of("model-1.bin"), "not a shard"),
    ("empty index", index_of(), "names no weight files"),
    ("missing tensor", drop_a_tensor, r"missing keys: model\.norm\.weight"),
    ("not a number", spoil_a_tensor, "not finite"),
    ("no tokenizer", remove("tokenizer.json"), r"tokenizer\.json is missing"),
    ("bad tokenizer", overwrite("tokenizer.json", "{}"), r"tokenizer\.json is malformed"),
    ("bad eos", overwrite("generation_config.json", '{"eos_token_id": "x"}'), "not token ids"),
    ("eos outside", overwrite("generation_config.json", '{"eos_token_id": 300}'), "outside"),
]


@pytest.mark.parametrize(
    ("spoil", "reason"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS]
)
def test_a_faulty_folder_is_refused(
    folder: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(folder)
    with pytest.raises(InvalidCheckpoint, match=reason) as caught:
        load_model(folder, dtype="float32")
    assert caught.value.code == "FAILED_PRECONDITION"
    assert str(folder) in caught.value.message


def test_only_local_folders_load(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="local folders only"):
        load_model("gpt2", dtype="float32")
    with pytest.raises(InvalidCheckpoint, match="local folders only"):
        load_model(tmp_path / "missing", dtype="float32")


def test_an_unknown_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="float32, bfloat16, float64"):
        load_model(folder, dtype="float16")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    larger = write_tiny_llama(tmp_path / "larger", vocab_size=400)
    (folder / "tokenizer.json").write_bytes((larger / "tokenizer.json").read_bytes())
    with pytest.raises(InvalidCheckpoint, match="400 ids, the model's vocabulary 300"):
        load_model(folder, dtype="float32")


UNSERVED: list[tuple[PreTrainedConfig, str]] = [
    (MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2), "linear_attention"),
    (
        Qwen3NextConfig(
            **SHAPE,
            head_dim=16,
            num_experts=2,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        "linear_attention",
    ),
    (GptOssConfig(**SHAPE, head_dim=16, num_local_experts=4, num_experts_per_tok=2), "s_aux"),
    (
        DeepseekV3Config(
            **SHAPE,
            n_routed_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            n_group=1,
            topk_group=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        "one head size",
    ),
    (BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4), "max_position_embeddings"),
    (StableLmConfig(**SHAPE), "does not hand the arguments"),
]


@pytest.mark.parametrize(
    ("config", "reason"), UNSERVED, ids=[config.model_type for config, _ in UNSERVED]
)
def test_an_architecture_that_is_not_served_says_why(
    config: PreTrainedConfig, reason: str, tmp_path: Path
) -> None:
    config.eos_token_id = 4
    with pytest.raises(InvalidCheckpoint, match=reason):
        load_model(write_tiny(tmp_path / "model", config), dtype="float32")


@pytest.mark.parametrize(
    ("name", "op", "fused"),
    [
        ("specinfer_engine.attention.tree_attention", tree_attention, False),
        ("specinfer_engine.fused.decoder_logits", decoder_logits, True),
    ],
)
def test_arithmetic_behind_our_back_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, op: Callable[..., Any], fused: bool
) -> None:
    """The comparison with stock logits sees what no argument tells."""

    def planted(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = op(*args, **kwargs)
        return result + 0.1 * result.flip(-1)

    monkeypatch.setattr(name, planted)
    with pytest.raises(InvalidCheckpoint, match="gives other logits"):
        load_model(folder, dtype="float32", fused=fused)


def test_facts_of_a_loaded_model(folder: Path) -> None:
    loaded = load_model(folder, dtype="bfloat16")
    assert loaded.name == "llama"
    assert load_model(folder, dtype="bfloat16", name="served").name == "served"
    shape = (loaded.num_layers, loaded.num_heads, loaded.num_kv_heads, loaded.head_dim)
    assert shape == (1, 4, 2, 8)
    assert (loaded.vocab_size, loaded.max_model_len) == (300, 512)
    assert loaded.eos_token_ids == (4,)
    assert loaded.dtype == torch.bfloat16
    assert loaded.row_invariant
    files = loaded.tokenizer_files
    assert files.tokenizer_json == (folder / "tokenizer.json").read_bytes()
    assert (files.bos_token, files.eos_token) == ("<|bos|>", "<|end|>")
    assert files.chat_template == CHAT_TEMPLATE


def test_a_hash_is_of_all_parts_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_HASH_PART_BYTES", 8)
    monkeypatch.setattr(checkpoint, "_HASH_CHUNK_BYTES", 4)
    file = tmp_path / "weights"
    one, two = b"abcdefgh", b"ijklmnop"
    texts = [b"", b"a", one + two, one + two + b"q", two + one + b"q", one + two + b"r"]
    texts.append(one + b"ijkl_nop" + b"q")
    hashes = set()
    for text in texts:
        file.write_bytes(text)
        hashes.add(checkpoint._hash_files([file]))
        assert checkpoint._hash_files([file]) in hashes
    assert len(hashes) == len(texts)


def test_a_models_hash_stays_what_it_is(tmp_path: Path) -> None:
    """Workers of two builds in a pool, and stored sessions, go by it."""
    (file := tmp_path / "weights").write_bytes(bytes(range(256)) * ((1 << 18) + 1))
    part, rest = (hashlib.sha256(bytes(range(256)) * count).digest() for count in (1 << 18, 1))
    whole = hashlib.sha256(f"weights\0{(1 << 26) + 256}\0".encode() + part + rest)
    assert checkpoint._hash_files([file]) == whole.hexdigest()


def test_hashes_follow_the_files(folder: Path, tmp_path: Path) -> None:
    first = load_model(folder, dtype="float32")
    again = load_model(folder, dtype="float64")
    assert (first.model_hash, first.tokenizer_hash) == (again.model_hash, again.tokenizer_hash)
    other = load_model(
        write_tiny_llama(tmp_path / "b", vocab_size=300, hidden_size=32, num_layers=1, seed=7),
        dtype="float32",
    )
    assert other.model_hash != first.model_hash
    assert other.tokenizer_hash == first.tokenizer_hash
    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer + "\n")
    assert load_model(folder, dtype="float32").tokenizer_hash != first.tokenizer_hash


def test_settings_in_other_files(folder: Path) -> None:
    """End tokens as a list, a template inside the tokenizer's settings, tokens as objects."""
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 2, 4]}')
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": "x"}, {"name": "tools", "template": "y"}]
    edit_json(
        folder / "tokenizer_config.json", chat_template=templates, bos_token={"content": "<b>"}
    )
    loaded = load_model(folder, dtype="float32")
    assert loaded.eos_token_ids == (4, 2)
    assert loaded.tokenizer_files.chat_template == "x"
    assert loaded.tokenizer_files.bos_token == "<b>"


def test_weights_in_shards(tmp_path: Path, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2])):
        file = f"model-{index}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert load_model(folder, dtype="float32").row_invariant


def test_lengths_where_rotary_frequencies_change_are_cut(tmp_path: Path) -> None:
    """Frequencies that depend on the longest row of a pass would break rows apart."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    config = Phi3Config(
        **SHAPE, pad_token_id=0, original_max_position_embeddings=64, rope_parameters=rope
    )
    loaded = load_model(write_tiny(tmp_path / "phi3", config), dtype="float32")
    assert loaded.max_model_len == 64
    plain = LlamaConfig(**SHAPE)
    assert load_model(write_tiny(tmp_path / "llama", plain), dtype="float32").max_model_len == 128


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path, vocab_size=300, tied=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load_model(folder, dtype="float32").row_invariant


def test_every_promised_family_has_a_configuration() -> None:
    assert len(architectures()) == 16


def test_bfloat16_loads_on_a_processor_without_its_instructions(tmp_path: Path) -> None:
    """oneDNN is told to do without AVX-512, which it reads once, so in a process of its own."""
    folder = write_tiny_llama(tmp_path)
    script = (
        "import sys; from specinfer_engine.loader import load_model; "
        "print(load_model(sys.argv[1], dtype='bfloat16').row_invariant)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
