"""What a checkpoint will take of memory, read from its folder without loading anything.

This module knows nothing of torch; it reads the sizes that safetensors files and config.json state.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specinfer.errors import InvalidCheckpoint

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
MAX_HEADER_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True)
class MemoryPlan:
    """What serving a checkpoint takes.

    Attributes:
        num_parameters: of the checkpoint.
        weight_bytes: of the parameters in the number format of the plan.
        bytes_per_token: keys and values of one token.
        max_model_len: longest session in tokens.
        free_bytes: memory that this machine has to give now.
    """

    num_parameters: int
    weight_bytes: int
    bytes_per_token: int
    max_model_len: int
    free_bytes: int

    @property
    def session_bytes(self) -> int:
        """Keys and values of the longest session."""
        return self.bytes_per_token * self.max_model_len

    def tokens_in(self, num_bytes: int) -> int:
        """Tokens whose keys and values fit."""
        return max(0, num_bytes) // self.bytes_per_token


def plan_memory(folder: Path, dtype: str, kv_dtype: str = "auto") -> MemoryPlan:
    """The plan for the checkpoint in `folder`.

    Args:
        folder: with config.json and safetensors files.
        dtype: number format to serve in, one of ITEM_BYTES.
        kv_dtype: of keys and values: "auto" for the same, or "fp8".

    Raises:
        InvalidCheckpoint: files are missing or are none.
    """
    item_bytes = ITEM_BYTES[dtype]
    kv_item_bytes = 1 if kv_dtype == "fp8" else item_bytes
    config = _config(folder)
    try:
        num_heads = int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or config["hidden_size"] // num_heads)
        num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
        num_layers = int(config["num_hidden_layers"])
        max_model_len = int(config["max_position_embeddings"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InvalidCheckpoint(f"{folder}/config.json lacks {error}", field="model") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidCheckpoint(f"{folder} holds no safetensors file", field="model")
    num_parameters = sum(_num_parameters(path) for path in files)
    return MemoryPlan(
        num_parameters=num_parameters,
        weight_bytes=num_parameters * item_bytes,
        bytes_per_token=2 * num_layers * num_kv_heads * head_dim * kv_item_bytes,
        max_model_len=max_model_len,
        free_bytes=free_memory(),
    )


def free_memory() -> int:
    """Bytes that this machine can give without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = dict(line.split(":", 1) for line in lines)
        return int(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"{folder} has no config.json: {error}", field="model") from error
    if not isinstance(config, dict):
        raise InvalidCheckpoint(f"{folder}/config.json is no object", field="model")
    return config.get("text_config") or config


def _num_parameters(path: Path) -> int:
    """Elements of all tensors in a file: eight bytes of length, then a JSON header."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        return sum(
            math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidCheckpoint(f"{path} is no safetensors file: {error}", field="model") from error
