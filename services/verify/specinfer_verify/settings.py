"""Settings of a verify worker, read once at start. Nothing else reads flags or the environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from specinfer.errors import InvalidRequest
from specinfer.settings import read_settings, required_setting, setting
from specinfer.worker_settings import AUTO, OFF, ON, WorkerSettings

PREFIX = "SPECINFER_VERIFY"


@dataclass(frozen=True)
class Settings(WorkerSettings):
    """What `python -m specinfer_verify --help` lists.

    Raises:
        InvalidRequest: when values are out of range.
    """

    model: Path = required_setting("folder of the target's checkpoint (safetensors)")
    address: str = setting("127.0.0.1:50071", "where to listen: HOST:PORT (0: any) or unix:/PATH")
    min_prefill_rows: int = setting(64, "rows of every pass that prefill may have")
    yield_seconds: float = setting(0.1, "silence after which blocks go to a waiting session")
    starve_seconds: float = setting(2.0, "wait after which an older session's blocks are taken")
    silent_seconds: float = setting(10.0, "silence after which a place goes to a new session")
    session_idle_seconds: float = setting(600.0, "silence after which a session is closed")
    gather: str = setting(
        AUTO, "auto: a pass waits for sessions that are due where that pays; off: never"
    )
    roots_ahead: str = setting(
        AUTO, "compute plain decoding's next root before it asks: on, off, or auto: unless on a CPU"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gather not in (AUTO, OFF):
            raise InvalidRequest("--gather is auto or off", field="gather")
        if self.roots_ahead not in (AUTO, ON, OFF):
            raise InvalidRequest("--roots-ahead is auto, on or off", field="roots_ahead")

    @property
    def goes_ahead(self) -> bool:
        """Whether roots are computed that may never be asked for.

        The cores of a CPU have the wire to carry meanwhile, and a pass waits for its last core.
        """
        on_cpu = self.device.startswith("cpu")
        return self.roots_ahead == ON or (self.roots_ahead == AUTO and not on_cpu)


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
