"""The compose file and the Dockerfile agree with each other and with the services' settings."""

import dataclasses
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text(encoding="utf-8")
TIERS = ("router", "draft", "verify")
LISTENING = {
    "router": "SPECINFER_ROUTER_GRPC",
    "draft": "SPECINFER_DRAFT_ADDRESS",
    "verify": "SPECINFER_VERIFY_ADDRESS",
}
# What compose 1.29 with engine 20.10 understands of a service, as far as we use it.
SERVICE_KEYS = {
    *("image", "build", "environment", "ports", "depends_on", "restart", "healthcheck"),
    *("init", "stop_grace_period"),
}


def settings_of(tier: str) -> Any:
    """The class of this tier's settings."""
    module = import_module(f"specinfer_{tier}.settings")
    return module.RouterSettings if tier == "router" else module.Settings


def settings_fields(tier: str) -> set[str]:
    """The environment variables that this tier's settings read."""
    fields = dataclasses.fields(settings_of(tier))
    return {f"SPECINFER_{tier.upper()}_{item.name.upper()}" for item in fields}


def test_old_compose_understands_the_file() -> None:
    assert set(COMPOSE) == {"services"}
    assert set(COMPOSE["services"]) == {"redis", *TIERS}
    for name, service in COMPOSE["services"].items():
        assert set(service) <= SERVICE_KEYS, name
        assert "healthcheck" in service, name
    assert "# syntax=" not in DOCKERFILE


@pytest.mark.parametrize("tier", TIERS)
def test_environment_names_settings_that_exist(tier: str) -> None:
    assert set(COMPOSE["services"][tier]["environment"]) <= settings_fields(tier)


@pytest.mark.parametrize("tier", TIERS)
def test_services_have_time_to_drain_and_an_init_that_passes_signals_on(tier: str) -> None:
    service = COMPOSE["services"][tier]
    grace = re.fullmatch(r"(\d+)s", service["stop_grace_period"])
    assert grace is not None
    assert int(grace[1]) > settings_of(tier).drain_seconds
    assert service["init"] is True


@pytest.mark.parametrize("tier", TIERS)
def test_probe_asks_where_the_service_listens(tier: str) -> None:
    service = COMPOSE["services"][tier]
    address = service["environment"][LISTENING[tier]]
    assert service["healthcheck"]["test"][-1].rpartition(":")[2] == address.rpartition(":")[2]


@pytest.mark.parametrize("tier", TIERS)
def test_build_targets_exist(tier: str) -> None:
    build = COMPOSE["services"][tier]["build"]
    assert (ROOT / build["dockerfile"]).exists()
    assert re.search(rf"^FROM \S+ AS {build['target']}$", DOCKERFILE, flags=re.MULTILINE)
    assert f'ENTRYPOINT ["python", "-m", "specinfer_{tier}"]' in DOCKERFILE


def test_images_copy_what_exists() -> None:
    sources = re.findall(r"^COPY ((?!--).+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    missing = [name for line in sources for name in line.split() if not (ROOT / name).exists()]
    assert sources
    assert not missing


def test_ports_are_published_on_loopback_alone() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_models_of_the_compose_file_are_shipped() -> None:
    for tier in ("draft", "verify"):
        model = COMPOSE["services"][tier]["environment"][f"SPECINFER_{tier.upper()}_MODEL"]
        folder = ROOT / Path(model).relative_to("/srv/specinfer")
        assert (folder / "config.json").exists()
        assert list(folder.glob("*.safetensors"))
