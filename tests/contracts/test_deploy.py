"""The compose file and the Dockerfile agree with each other and with the services' settings."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from specinfer import probe
from tests.kit.deploy import SERVICES_OF_OURS, TIERS, settings_fields, settings_of

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text(encoding="utf-8")
OURS = {name: tier for tier in TIERS for name in (tier, f"{tier}-gpu")}
PROBE = Path(probe.__file__).relative_to(ROOT)
PROFILES = {
    "gpu": {"router-gpu", "draft-gpu", "verify-gpu"},
    "observability": {"prometheus", "alertmanager", "grafana", "collector"},
}
# What compose 1.29 with engine 20.10 understands of a service, as far as we use it.
SERVICE_KEYS = {
    *("image", "build", "environment", "ports", "depends_on", "restart", "healthcheck"),
    *("init", "stop_grace_period", "read_only", "tmpfs", "cap_drop", "cap_add", "security_opt"),
    *("pids_limit", "logging", "secrets", "networks", "volumes", "cpus", "mem_limit", "command"),
    *("profiles", "deploy"),
}


def test_old_compose_understands_the_file() -> None:
    keys = {key for key in COMPOSE if not key.startswith("x-")}
    assert keys == {"services", "networks", "volumes", "secrets"}
    assert set(SERVICES) == {"redis", *TIERS} | PROFILES["gpu"] | PROFILES["observability"]
    for name, service in SERVICES.items():
        assert set(service) <= SERVICE_KEYS, name
    assert "# syntax=" not in DOCKERFILE


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_held_in(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not any("noexec" in mount for mount in service["tmpfs"])
    assert service["cpus"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert "cap_add" not in service or name == "redis"
    # The collector's image holds no second program that could ask.
    assert "healthcheck" in service or name == "collector"


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned_by_tag(name: str) -> None:
    image = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", SERVICES[name]["image"])
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", image), image


def test_profiles_hold_what_they_are_named_for() -> None:
    for profile, names in PROFILES.items():
        found = {
            name for name, service in SERVICES.items() if profile in service.get("profiles", ())
        }
        assert found == names


@pytest.mark.parametrize("name", OURS)
def test_environment_names_settings_that_exist(name: str) -> None:
    ours = {key for key in SERVICES[name]["environment"] if key.startswith("SPECINFER_")}
    assert ours <= settings_fields(OURS[name])


def test_nobody_is_told_where_a_worker_is() -> None:
    for name, tier in OURS.items():
        environment = SERVICES[name]["environment"]
        assert environment[f"SPECINFER_{tier.upper()}_REDIS"].startswith("redis://specinfer@redis:")
        assert "SPECINFER_ROUTER_DRAFT" not in environment
        assert "SPECINFER_ROUTER_VERIFY" not in environment


def test_no_secret_is_in_the_file() -> None:
    assert all(list(secret) == ["file"] for secret in COMPOSE["secrets"].values())
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    without_variables = re.sub(r"\$\{[^}]*\}", "", text)
    assert not re.search(r"(?i)(password|secret|token): *[\"']?\w", without_variables)


def test_the_secrets_that_are_mounted_are_made(tmp_path: Path) -> None:
    script = str(ROOT / "deploy/secrets.sh")
    subprocess.run([script, str(tmp_path)], check=True, capture_output=True)
    first = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(first) == {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    assert len(first["redis_password"]) == 48
    subprocess.run([script, str(tmp_path)], check=True, capture_output=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == first


def test_redis_gives_the_rights_that_the_page_lists(tmp_path: Path) -> None:
    subprocess.run(
        [str(ROOT / "deploy/secrets.sh"), str(tmp_path)], check=True, capture_output=True
    )
    digest = hashlib.sha256((tmp_path / "redis_password").read_bytes()).hexdigest()
    page = (ROOT / "docs/sessions.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in page if line.startswith("user specinfer ")]
    acl = (tmp_path / "redis_acl").read_text().splitlines()
    assert line.replace(">PASSWORD", f"#{digest}") in acl
    assert acl[0] == "user default on nopass resetkeys resetchannels -@all +ping"


@pytest.mark.parametrize("name", OURS)
def test_services_have_time_to_drain(name: str) -> None:
    grace = re.fullmatch(r"(\d+)s", SERVICES[name]["stop_grace_period"])
    assert grace is not None
    assert int(grace[1]) > settings_of(OURS[name]).drain_seconds


@pytest.mark.parametrize("name", OURS)
def test_probe_asks_where_the_service_listens(name: str) -> None:
    service, of = SERVICES[name], SERVICES_OF_OURS[OURS[name]]
    assert service["environment"][of.variable] == f"0.0.0.0:{of.port}"
    command = ["CMD", "python", "-IS", f"/opt/specinfer/{PROBE}", f"127.0.0.1:{of.port}"]
    assert service["healthcheck"]["test"] == command
    assert f"CMD {json.dumps(command[1:])}" in DOCKERFILE
    assert service["environment"][of.metrics_variable] == f"0.0.0.0:{of.metrics_port}"


@pytest.mark.parametrize("name", OURS)
def test_build_targets_exist(name: str) -> None:
    build = SERVICES[name]["build"]
    assert (ROOT / build["dockerfile"]).exists()
    assert re.search(rf"^FROM \S+ AS {build['target']}$", DOCKERFILE, flags=re.MULTILINE)
    assert f'ENTRYPOINT ["python", "-m", "specinfer_{OURS[name]}"]' in DOCKERFILE


def test_images_run_as_nobody_special_and_hold_no_compiler() -> None:
    final = DOCKERFILE.partition(" AS base\n")[2]
    assert final.count("USER 10001:10001") == 2
    assert "g++" not in final
    assert "models" not in re.sub(r"#.*", "", DOCKERFILE)


def test_images_install_the_torch_that_is_tested() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    argument = re.search(r"^ARG TORCH=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert argument is not None
    assert argument[1] in pins


def test_images_copy_what_exists_and_what_the_ignore_file_lets_through() -> None:
    sources = re.findall(r"^COPY ((?!--).+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    names = {name for line in sources for name in line.split()}
    assert names
    assert not [name for name in names if not (ROOT / name).exists()]
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    let_through = {line[1:] for line in lines if line.startswith("!")}
    assert let_through <= names
    assert all({name, name.partition("/")[0]} & let_through for name in names)


def test_ports_are_published_on_loopback_alone_and_redis_not_at_all() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert "ports" not in SERVICES["redis"]
    assert COMPOSE["networks"]["back"]["internal"] is True
    inner = {"redis", "draft", "verify", "draft-gpu", "verify-gpu", "collector"}
    assert all(set(SERVICES[name]["networks"]) == {"back"} for name in inner)


def test_models_of_the_compose_file_are_shipped() -> None:
    for tier in ("draft", "verify"):
        text = SERVICES[tier]["environment"][f"SPECINFER_{tier.upper()}_MODEL"]
        model = re.fullmatch(r"\$\{\w+:-/models/(.+)\}", text)
        assert model is not None
        assert (ROOT / "models" / model[1] / "config.json").exists()
        assert list((ROOT / "models" / model[1]).glob("*.safetensors"))


def test_redis_loses_nothing_by_choice() -> None:
    lines = (ROOT / "deploy/redis/redis.conf").read_text(encoding="utf-8").splitlines()
    assert {"maxmemory-policy noeviction", "appendonly yes"} <= set(lines)
    assert any(line.startswith("aclfile /run/secrets/") for line in lines)


def test_prometheus_scrapes_every_process() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    for tier in TIERS:
        (found,) = jobs[tier]["dns_sd_configs"]
        assert (found["names"], found["type"]) == ([tier], "A")
        assert found["port"] == SERVICES_OF_OURS[tier].metrics_port


def test_mounted_files_exist() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).is_dir(), (name, source)


def test_the_page_of_settings_is_what_the_classes_say() -> None:
    module = import_module("tools.generate_settings")
    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert text == module.reference()
    for tier in TIERS:
        for item in dataclasses.fields(settings_of(tier)):
            assert f"`SPECINFER_{tier.upper()}_{item.name.upper()}`" in text


def test_the_probe_needs_nothing_that_is_installed() -> None:
    """It is run by its path, isolated: a package or a module of ours would not be found."""
    command = [sys.executable, "-IS", str(ROOT / PROBE), "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "refused" in done.stderr


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (("promtool", "check", "config"), "deploy/prometheus/prometheus.yml"),
        (("amtool", "check-config"), "deploy/alertmanager/alertmanager.yml"),
    ],
)
def test_the_tools_of_prometheus_take_our_files(command: tuple[str, ...], file: str) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([*command, str(ROOT / file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
