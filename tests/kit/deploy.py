"""What the tests of the compose file and of the manifests share: tiers, ports, settings."""

import dataclasses
from dataclasses import dataclass
from importlib import import_module
from typing import Any

TIERS = ("router", "draft", "verify")


@dataclass(frozen=True)
class DeployedTier:
    """Where a tier listens in every deployment that we ship."""

    variable: str
    port: int
    metrics_variable: str
    metrics_port: int


SERVICES_OF_OURS = {
    "router": DeployedTier("SPECINFER_ROUTER_GRPC", 50051, "SPECINFER_ROUTER_METRICS", 9051),
    "draft": DeployedTier("SPECINFER_DRAFT_ADDRESS", 50061, "SPECINFER_DRAFT_METRICS", 9061),
    "verify": DeployedTier("SPECINFER_VERIFY_ADDRESS", 50071, "SPECINFER_VERIFY_METRICS", 9071),
}


def settings_of(tier: str) -> Any:
    """The class of this tier's settings."""
    module = import_module(f"specinfer_{tier}.settings")
    return module.RouterSettings if tier == "router" else module.Settings


def settings_fields(tier: str) -> set[str]:
    """The environment variables that this tier's settings read."""
    fields = dataclasses.fields(settings_of(tier))
    return {f"SPECINFER_{tier.upper()}_{item.name.upper()}" for item in fields}
