"""A model folder on disk: which files count, whether they are whole, and their hashes.

Local folders and safetensors only; pickled weights are refused unread. Reads bytes and JSON; knows
no architecture and builds no tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from specinfer.cores import usable_cores
from specinfer.errors import InvalidCheckpoint

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.json"
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HASH_CHUNK_BYTES = 1 << 22
_HASH_PART_BYTES = 1 << 26  # another number makes another hash of every model
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class TokenizerFiles:
    """What a router needs to turn text into tokens and back, without the model's folder.

    Attributes:
        tokenizer_json: bytes of tokenizer.json.
        chat_template: jinja source, or None when the model brings none.
        bos_token, eos_token: their texts, or "" when unnamed.
    """

    tokenizer_json: bytes
    chat_template: str | None = None
    bos_token: str = ""
    eos_token: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files are all there and whole.

    Attributes:
        folder: where it is.
        config: config.json as read.
        eos_token_ids: from generation_config.json, or else from config.json.
        model_hash: hex, SHA-256 over the SHA-256s of the parts of config.json and the weights.
        tokenizer_hash: hex SHA-256.
        tokenizer_files: bytes and settings for a router.
        num_tokenizer_ids: one more than the tokenizer's highest id.
    """

    folder: Path
    config: Mapping[str, Any]
    eos_token_ids: tuple[int, ...]
    model_hash: str
    tokenizer_hash: str
    tokenizer_files: TokenizerFiles
    num_tokenizer_ids: int


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Check a model folder and read all of it that is not a tensor.

    Raises:
        InvalidCheckpoint: saying which file is missing, truncated, pickled or malformed.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InvalidCheckpoint(
            f"{folder} is not a folder; models are loaded from local folders only"
        )
    config = _read_json(folder / CONFIG_FILE)
    weights = _weight_files(folder)
    for file in weights:
        _check_whole(file)
    tokenizer_json = _read_bytes(folder / TOKENIZER_FILE)
    settings = _read_json(folder / "tokenizer_config.json", optional=True)
    return Checkpoint(
        folder=folder,
        config=config,
        eos_token_ids=_eos_token_ids(folder, config),
        model_hash=_hash_files([folder / CONFIG_FILE, *weights]),
        tokenizer_hash=hashlib.sha256(tokenizer_json).hexdigest(),
        tokenizer_files=TokenizerFiles(
            tokenizer_json=tokenizer_json,
            chat_template=_chat_template(folder, settings),
            bos_token=_token_text(settings.get("bos_token")),
            eos_token=_token_text(settings.get("eos_token")),
        ),
        num_tokenizer_ids=_num_tokenizer_ids(folder, tokenizer_json),
    )


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is unreadable: {error}"
        raise InvalidCheckpoint(f"{file.name} {reason} in {file.parent}") from error


def _read_json(file: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not file.exists():
        return {}
    try:
        content = json.loads(_read_bytes(file))
    except ValueError as error:
        raise InvalidCheckpoint(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidCheckpoint(f"{file} holds no JSON object")
    return content


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint, sorted by name."""
    if (folder / INDEX_FILE).exists():
        weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InvalidCheckpoint(f"{folder / INDEX_FILE} names no weight files")
        names = {str(name) for name in weight_map.values()}
        for name in names:
            # A name must not lead out of the folder.
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise InvalidCheckpoint(f"{folder / INDEX_FILE} names {name!r}, not a shard")
        return [folder / name for name in sorted(names)]
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED_SUFFIXES)
    if pickled:
        raise InvalidCheckpoint(
            f"{folder} holds pickled weights ({', '.join(pickled[:3])}), which can run any code; "
            "convert them to safetensors"
        )
    raise InvalidCheckpoint(f"{WEIGHTS_FILE} is missing in {folder}")


def _check_whole(file: Path) -> None:
    """Raise InvalidCheckpoint unless a safetensors file is exactly as long as its header says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= header_size <= min(size - 8, _MAX_HEADER_BYTES):
                raise InvalidCheckpoint(f"{file} is truncated or no safetensors file")
            header = json.loads(stream.read(header_size))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        expected = 8 + header_size + max(ends, default=0)
    except FileNotFoundError as error:
        raise InvalidCheckpoint(f"{file.name} is missing in {file.parent}") from error
    except OSError as error:
        raise InvalidCheckpoint(f"{file} is unreadable: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InvalidCheckpoint(f"{file} has a malformed safetensors header") from error
    if size != expected:
        raise InvalidCheckpoint(f"{file} is truncated: {size} bytes, its header says {expected}")


def _hash_files(files: Iterable[Path]) -> str:
    """SHA-256 over the name and length of each file, in the order given, and SHA-256s of its parts.

    In parts, since all cores hash side by side: one of them takes seconds for a gigabyte where the
    processor has no instructions for it.
    """
    total = hashlib.sha256()
    with ThreadPoolExecutor(len(usable_cores())) as pool:
        for file in files:
            size = file.stat().st_size
            total.update(f"{file.name}\0{size}\0".encode())
            for digest in pool.map(partial(_hash_part, file), range(0, size, _HASH_PART_BYTES)):
                total.update(digest)
    return total.hexdigest()


def _hash_part(file: Path, start: int) -> bytes:
    part = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(start)
        for _ in range(_HASH_PART_BYTES // _HASH_CHUNK_BYTES):
            part.update(stream.read(_HASH_CHUNK_BYTES))
    return part.digest()


def _eos_token_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    generation = _read_json(folder / "generation_config.json", optional=True)
    nested = config.get("text_config")
    sources = (generation, config, nested if isinstance(nested, dict) else {})
    for source in sources:
        given = source.get("eos_token_id")
        if given is None:
            continue
        values = given if isinstance(given, list) else [given]
        if not all(isinstance(value, int) and value >= 0 for value in values):
            raise InvalidCheckpoint(f"eos_token_id in {folder} is {given!r}, not token ids")
        return tuple(dict.fromkeys(values))
    return ()


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return _decode(file)
    given = settings.get("chat_template")
    if isinstance(given, list):
        named = {
            entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)
        }
        given = named.get("default")
    return given if isinstance(given, str) else None


def _decode(file: Path) -> str:
    try:
        return _read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise InvalidCheckpoint(f"{file} is not UTF-8") from error


def _token_text(given: object) -> str:
    content = given.get("content") if isinstance(given, dict) else given
    return content if isinstance(content, str) else ""


def _num_tokenizer_ids(folder: Path, tokenizer_json: bytes) -> int:
    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # the library raises plain Exception for every fault of the file
        raise InvalidCheckpoint(f"{folder / TOKENIZER_FILE} is malformed: {error}") from error
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
