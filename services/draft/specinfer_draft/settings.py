"""Settings of a draft worker, read once at start. Nothing else reads flags or the environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from specinfer.errors import InvalidRequest
from specinfer.settings import read_settings, required_setting, setting
from specinfer.worker_settings import WorkerSettings

PREFIX = "SPECINFER_DRAFT"


@dataclass(frozen=True)
class Settings(WorkerSettings):
    """What `python -m specinfer_draft --help` lists.

    Raises:
        InvalidRequest: when values are out of range.
    """

    model: Path = required_setting("folder of the drafter's checkpoint (safetensors)")
    address: str = setting("127.0.0.1:50061", "where to listen: HOST:PORT (0: any) or unix:/PATH")
    kv_memory: int = setting(256, "MiB of the KV pool, taken once at start")
    max_sessions: int = setting(256, "most sessions followed; the least recently used one goes")
    max_rows: int = setting(512, "most rows of a pass")
    drain_seconds: float = setting(5.0, "how long trees may go on growing after SIGTERM")
    prefill_rows: int = setting(128, "most rows of prompts in a pass that carries trees")
    score_floor: float = setting(-5.0, "lowest log score of a best-first node")
    least_reach: float = setting(0.15, "least chance of being reached that a level is grown for")
    ahead: str = setting(
        "auto", "draft ahead while the target verifies: on, off, or auto: on unless on a CPU"
    )
    spread: float = setting(1.0, "how far the target's logits are taken to lie from the drafter's")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefill_rows < 1:
            raise InvalidRequest("prefill_rows is at least 1", field="prefill_rows")
        if not self.score_floor < 0 or not 0 <= self.least_reach <= 1:
            raise InvalidRequest(
                "score_floor is negative and least_reach between 0 and 1", field="score_floor"
            )
        if self.ahead not in ("auto", "on", "off"):
            raise InvalidRequest(f"ahead is auto, on or off, got {self.ahead}", field="ahead")
        if not 0 <= self.spread < float("inf"):
            raise InvalidRequest("spread is 0 or more", field="spread")

    @property
    def goes_ahead(self) -> bool:
        """Whether idle time goes into guesses that may never be asked for.

        A CPU is mostly shared with the verifier, whose step such guesses would slow down.
        """
        return self.ahead == "on" or (self.ahead == "auto" and not self.device.startswith("cpu"))


def parse_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings from flags and SPECINFER_DRAFT_* variables; flags win."""
    return read_settings(
        Settings,
        program="specinfer_draft",
        description="Draft worker: guesses what the target will say, as token trees.",
        prefix=PREFIX,
        arguments=arguments,
        environment=environment,
    )
