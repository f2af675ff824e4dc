"""Settings that draft and verify workers share: a model, its memory, and how to be reached.

This module knows nothing of what a tier does with its model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from specinfer.cores import MAX_THREADS, parse_cores
from specinfer.errors import InvalidRequest
from specinfer.redis_connection import RedisSettings, redis_of
from specinfer.registry import check_group
from specinfer.rpc import TlsSettings
from specinfer.settings import required_setting, setting
from specinfer.telemetry import TraceSettings

KEEP, RENEW, OFF = "keep", "renew", "off"
AUTO, ON = "auto", "on"
FP8 = "fp8"
_AT_LEAST_ONE = ("kv_memory", "block_size", "max_sessions", "max_tree_nodes", "max_rows")


@dataclass(frozen=True)
class WorkerSettings:
    """What every worker is told at its start; a tier adds its own fields and defaults.

    Raises:
        InvalidRequest: when values are out of range.
    """

    model: Path = required_setting("folder of the checkpoint (safetensors)")
    address: str = setting("127.0.0.1:0", "where to listen: HOST:PORT (0: any) or unix:/PATH")
    advertise: str = setting("", "address that routers reach us at; host name and port if empty")
    name: str = setting("", "name of the model; the folder's name if empty")
    dtype: str = setting("bfloat16", "float32, bfloat16 or float64")
    weights: str = setting("stored", "stored, or int8: another model, of half the bytes to read")
    kv_dtype: str = setting(
        AUTO, "keys and values: auto (as --dtype), or fp8: another model, one byte for each number"
    )
    device: str = setting("cpu", "device of the model, such as cpu or cuda:0")
    kv_blocks: int | None = setting(None, "blocks of the KV pool; overrides --kv-memory")
    kv_memory: int = setting(1024, "MiB of the KV pool, taken once at start")
    block_size: int = setting(16, "tokens in a block")
    max_sessions: int = setting(256, "most sessions open at once")
    max_tree_nodes: int = setting(64, "largest tree, root included")
    max_rows: int = setting(256, "most rows of a pass")
    drain_seconds: float = setting(30.0, "how long work may go on after SIGTERM")
    threads: int = setting(0, "threads of a pass on a CPU; 0: one for each of --cores, or torch's")
    cores: str = setting("", "cores to run on, such as 0-3,8; empty: wherever the system likes")
    profile: str = setting(
        KEEP, "measured cost of passes: keep it in the cache folder, renew it, or off: no file"
    )
    cuda_graphs: str = setting(
        AUTO, "record passes once and replay them: auto (on a CUDA device) or off"
    )
    worker_id: str = setting("", "unique name of this worker; made up if empty")
    redis: str = setting("", "URL of the Redis that routers find us by; empty: they are told")
    redis_password_file: Path | None = setting(None, "file that holds Redis's password")
    redis_ca: Path | None = setting(None, "certificates to trust for rediss://, PEM")
    redis_certificate: Path | None = setting(None, "our certificate for Redis, PEM")
    redis_key: Path | None = setting(None, "its private key, PEM")
    redis_cluster: bool = setting(False, "the Redis is a cluster")
    group: str = setting("default", "workers and routers of one group find each other in Redis")
    metrics: str = setting("", "address of the metrics over HTTP; empty: none")
    vllm_metrics: bool = setting(False, "show metrics under vLLM's names too")
    insecure_bind: bool = setting(False, "allow a plain-text port on other than loopback")
    reflection: bool = setting(True, "let gRPC tools list the services")
    tls_certificate: Path | None = setting(None, "PEM file of the certificate chain")
    tls_key: Path | None = setting(None, "PEM file of the private key")
    tls_ca: Path | None = setting(None, "PEM file of those who may sign client certificates")
    log_level: str = setting("info", "debug, info, warning or error")
    otlp_endpoint: str = setting("", "OTLP collector for traces, such as http://127.0.0.1:4317")

    def __post_init__(self) -> None:
        for field in _AT_LEAST_ONE:
            if getattr(self, field) < 1:
                raise InvalidRequest(f"{field} is at least 1", field=field)
        if self.kv_blocks is not None and self.kv_blocks < 1:
            raise InvalidRequest("kv_blocks is at least 1", field="kv_blocks")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name.endswith("_seconds") and not 0 <= value < float("inf"):
                raise InvalidRequest(f"{item.name} is 0 or more", field=item.name)
        redis_of(self)
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise InvalidRequest("--tls-certificate and --tls-key are given together", field="tls")
        if self.tls_ca is not None and self.tls_certificate is None:
            raise InvalidRequest("--tls-ca needs --tls-certificate and --tls-key", field="tls")
        if not 0 <= self.threads <= MAX_THREADS:
            raise InvalidRequest(
                f"threads is 0 to {MAX_THREADS}: give one for each core, or 0", field="threads"
            )
        if 0 < len(self.core_numbers) < self.threads:
            raise InvalidRequest("more --threads than --cores would take turns", field="threads")
        if self.profile not in (KEEP, RENEW, OFF):
            raise InvalidRequest("--profile is keep, renew or off", field="profile")
        if self.cuda_graphs not in (AUTO, OFF):
            raise InvalidRequest("--cuda-graphs is auto or off", field="cuda_graphs")
        if self.kv_dtype not in (AUTO, FP8):
            raise InvalidRequest("--kv-dtype is auto or fp8", field="kv_dtype")
        check_group(self.group)

    @property
    def redis_settings(self) -> RedisSettings | None:
        """The Redis that we announce ourselves in, or None."""
        return redis_of(self)

    @property
    def core_numbers(self) -> tuple[int, ...]:
        """The cores to run on; none for all that there are. Raises InvalidRequest."""
        return parse_cores(self.cores)

    @property
    def tls(self) -> TlsSettings | None:
        """Files of the TLS port, or None for plain text."""
        if self.tls_certificate is None:
            return None
        return TlsSettings(self.tls_ca, self.tls_certificate, self.tls_key)

    @property
    def traces(self) -> TraceSettings:
        """Where spans go; raises InvalidRequest."""
        return TraceSettings(self.otlp_endpoint)

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
