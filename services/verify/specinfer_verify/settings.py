"""Settings of a verify worker, read once at start. Nothing else reads flags or the environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from specinfer.errors import InvalidRequest
from specinfer.rpc import TlsSettings
from specinfer.settings import read_settings, required_setting, setting

PREFIX = "SPECINFER_VERIFY"


@dataclass(frozen=True)
class Settings:
    """What `python -m specinfer_verify --help` lists.

    Raises:
        InvalidRequest: when values are out of range.
    """

    model: Path = required_setting("folder of the target's checkpoint (safetensors)")
    address: str = setting("127.0.0.1:50071", "where to listen; port 0 takes a free one")
    name: str = setting("", "name to serve the model under; the folder's name if empty")
    dtype: str = setting("bfloat16", "float32, bfloat16 or float64")
    device: str = setting("cpu", "device of the model, such as cpu or cuda:0")
    kv_blocks: int | None = setting(None, "blocks of the KV pool; overrides --kv-memory")
    kv_memory: int = setting(1024, "MiB of the KV pool, taken once at start")
    block_size: int = setting(16, "tokens in a block")
    max_sessions: int = setting(256, "most sessions open at once")
    max_tree_nodes: int = setting(64, "largest tree taken, root included")
    max_rows: int = setting(256, "most rows of a pass")
    min_prefill_rows: int = setting(64, "rows of every pass that prefill may have")
    yield_seconds: float = setting(0.1, "silence after which blocks go to a waiting session")
    session_idle_seconds: float = setting(600.0, "silence after which a session is closed")
    drain_seconds: float = setting(30.0, "how long sessions may go on after SIGTERM")
    threads: int = setting(0, "threads of a pass on a CPU; 0 leaves it to torch")
    worker_id: str = setting("", "unique name of this worker; made up if empty")
    insecure_bind: bool = setting(False, "allow a plain-text port on other than loopback")
    tls_certificate: Path | None = setting(None, "PEM file of the certificate chain")
    tls_key: Path | None = setting(None, "PEM file of the private key")
    tls_ca: Path | None = setting(None, "PEM file of those who may sign client certificates")

    def __post_init__(self) -> None:
        for field in ("kv_memory", "block_size", "max_sessions", "max_tree_nodes", "max_rows"):
            if getattr(self, field) < 1:
                raise InvalidRequest(f"{field} is at least 1", field=field)
        if self.kv_blocks is not None and self.kv_blocks < 1:
            raise InvalidRequest("kv_blocks is at least 1", field="kv_blocks")
        for field in ("yield_seconds", "session_idle_seconds", "drain_seconds"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise InvalidRequest(f"{field} is 0 or more", field=field)

    @property
    def tls(self) -> TlsSettings | None:
        """Files of the TLS port, or None for plain text."""
        if self.tls_certificate is None:
            return None
        return TlsSettings(self.tls_ca, self.tls_certificate, self.tls_key)

    def num_blocks(self, bytes_per_token: int) -> int:
        """Blocks of the pool, given what one token's keys and values take.

        Raises:
            InvalidRequest: when the memory allowed does not hold a single block.
        """
        if self.kv_blocks is not None:
            return self.kv_blocks
        num_blocks = (self.kv_memory << 20) // (bytes_per_token * self.block_size)
        if num_blocks < 1:
            raise InvalidRequest(
                f"{self.kv_memory} MiB hold no block of {self.block_size} tokens of "
                f"{bytes_per_token} bytes",
                field="kv_memory",
            )
        return num_blocks


def parse_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings from flags and SPECINFER_VERIFY_* variables; flags win."""
    return read_settings(
        Settings,
        program="specinfer_verify",
        description="Verify worker: holds the target model and decides every token.",
        prefix=PREFIX,
        arguments=arguments,
        environment=environment,
    )
