"""Every overlay, resolved, is valid Kubernetes and agrees with the processes that it runs.

Validated offline: Kubernetes' own kinds strictly by its schemas, custom resources by the subset in
tests/kit/crd_schemas.py.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from specinfer.server import LIVENESS, READINESS, STARTUP
from tests.kit import kustomize
from tests.kit.crd_schemas import SCHEMAS
from tests.kit.deploy import SERVICES_OF_OURS, TIERS, settings_fields, settings_of
from tests.kit.kustomize import Manifest

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ("cpu", "gpu", "multi-gpu")
VERSIONS = ("1.30", kubernetes_validate.latest_version())
BUILT = {name: kustomize.build(ROOT / "deploy/kubernetes/overlays" / name) for name in OVERLAYS}


def templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod template with its app's name."""
    for manifest in manifests:
        spec = manifest.get("spec", {})
        group = spec.get("leaderWorkerTemplate", {})
        for template in (
            spec.get("template"),
            group.get("leaderTemplate"),
            group.get("workerTemplate"),
        ):
            if template:
                yield template["metadata"]["labels"]["app.kubernetes.io/name"], template


PODS = [
    pytest.param(name, template, id=f"{overlay}-{name}")
    for overlay, manifests in BUILT.items()
    for name, template in templates(manifests)
]
OUR_PODS = [case for case in PODS if case.values[0] in TIERS]


def check(manifest: Manifest, version: str) -> None:
    """Raise for a manifest that Kubernetes, or the subset we know, would refuse."""
    schema = SCHEMAS.get(manifest["kind"])
    if schema is None:
        kubernetes_validate.validate(manifest, version, strict=True)
        return
    jsonschema.validate(manifest, schema)
    for name, template in templates([manifest]):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(pod | {"metadata": {"name": name}}, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_manifest_is_valid(overlay: str, version: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in BUILT[overlay]]
    assert len(names) == len(set(names))
    for manifest in BUILT[overlay]:
        check(manifest, version)
        assert manifest["metadata"]["namespace"] == "specinfer"


@pytest.mark.parametrize(
    ("overlay", "kind", "path"),
    [
        ("cpu", "Deployment", ("spec", "template", "spec", "terminationGraceSeconds")),
        ("cpu", "StatefulSet", ("spec", "template", "spec", "containers", 0, "readyProbe")),
        ("gpu", "ScaledObject", ("spec", "minReplicas")),
        ("multi-gpu", "LeaderWorkerSet", ("spec", "leaderWorkerTemplate", "sizes")),
        (
            "multi-gpu",
            "LeaderWorkerSet",
            ("spec", "leaderWorkerTemplate", "leaderTemplate", "spec", "x"),
        ),
    ],
)
def test_a_misspelt_field_is_found(overlay: str, kind: str, path: tuple[Any, ...]) -> None:
    manifest = deepcopy(next(each for each in BUILT[overlay] if each["kind"] == kind))
    place: Any = manifest
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = 1
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        check(manifest, VERSIONS[-1])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_tier_runs_in_its_own_kind_of_set(overlay: str) -> None:
    kinds = {
        (each["kind"], each["metadata"]["name"])
        for each in BUILT[overlay]
        if each["kind"] in ("Deployment", "StatefulSet", "LeaderWorkerSet")
    }
    groups = {("LeaderWorkerSet", "group")}
    pools = {("Deployment", "draft"), ("StatefulSet", "verify")}
    expected = {("Deployment", "router")} | (groups if overlay == "multi-gpu" else pools)
    assert kinds - {("StatefulSet", "redis")} == expected


@pytest.mark.parametrize(("name", "template"), PODS)
def test_every_container_is_held_in(name: str, template: Manifest) -> None:
    pod = template["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        assert re.search(r":[\w.-]*\d", container["image"]), container["image"]


@pytest.mark.parametrize(("name", "template"), OUR_PODS)
def test_probes_ask_three_questions_where_the_process_listens(
    name: str, template: Manifest
) -> None:
    (container,) = template["spec"]["containers"]
    asked = {"startupProbe": STARTUP, "readinessProbe": READINESS, "livenessProbe": LIVENESS}
    for probe, service in asked.items():
        assert container[probe]["grpc"] == {
            "port": SERVICES_OF_OURS[name].port,
            "service": service,
        }
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        "grpc": SERVICES_OF_OURS[name].port,
        "metrics": SERVICES_OF_OURS[name].metrics_port,
        **({"http": 8000} if name == "router" else {}),
    }


@pytest.mark.parametrize(("name", "template"), OUR_PODS)
def test_a_pod_has_time_to_drain(name: str, template: Manifest) -> None:
    (container,) = template["spec"]["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    needed = int(command[1]) + settings_of(name).drain_seconds
    assert template["spec"]["terminationGracePeriodSeconds"] > needed


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_settings_are_ones_that_the_processes_read(overlay: str) -> None:
    maps = {
        each["metadata"]["name"].rpartition("-")[0]: each["data"]
        for each in BUILT[overlay]
        if each["kind"] == "ConfigMap"
    }
    whole = {each["metadata"]["name"] for each in BUILT[overlay] if each["kind"] == "ConfigMap"}
    for tier in TIERS:
        data, of = maps[f"specinfer-{tier}"], SERVICES_OF_OURS[tier]
        assert set(data) <= settings_fields(tier)
        assert data[of.variable] == f"0.0.0.0:{of.port}"
        assert data[of.metrics_variable] == f"0.0.0.0:{of.metrics_port}"
    for name, template in templates(BUILT[overlay]):
        (container,) = template["spec"]["containers"]
        if name in TIERS:
            (source,) = container["envFrom"]
            assert source["configMapRef"]["name"] in whole
            assert source["configMapRef"]["name"].startswith(f"specinfer-{name}-")
            given = {each["name"] for each in container.get("env", ())} - {"POD_IP"}
            assert given <= settings_fields(name)
            assert not given & set(maps[f"specinfer-{name}"])
    for tier in TIERS:
        name = f"SPECINFER_{tier.upper()}_REDIS_PASSWORD_FILE"
        assert maps[f"specinfer-{tier}"][name] == "/run/secrets/redis/password"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_is_in_a_manifest(overlay: str) -> None:
    assert not [each for each in BUILT[overlay] if each["kind"] == "Secret"]


def allowed(manifests: list[Manifest], caller: str, called: str, port: int) -> bool:
    """Whether the policies let one app call another: out of the one and into the other."""
    policies = {
        each["spec"]["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/name"): each
        for each in manifests
        if each["kind"] == "NetworkPolicy" and each["metadata"]["name"] not in ("dns",)
    }

    def named(peer: dict[str, Any], app: str) -> bool:
        selector = peer.get("podSelector", {})
        if "namespaceSelector" in peer:
            return False
        listed = [
            value
            for each in selector.get("matchExpressions", ())
            for value in each["values"]
            if each["operator"] == "In"
        ]
        return app in (selector.get("matchLabels", {}).get("app.kubernetes.io/name"), *listed)

    def lets(app: str, direction: str, side: str, other: str) -> bool:
        return any(
            any(named(peer, other) for peer in rule[side])
            and port in [each["port"] for each in rule["ports"]]
            for rule in policies[app]["spec"].get(direction, ())
        )

    return lets(caller, "egress", "to", called) and lets(called, "ingress", "from", caller)


def test_who_may_talk_to_whom() -> None:
    manifests, apps = BUILT["cpu"], (*TIERS, "redis")
    deny = next(each for each in manifests if each["metadata"]["name"] == "default-deny")
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ports = {name: of.port for name, of in SERVICES_OF_OURS.items()} | {"redis": 6379}
    found = {
        (caller, called)
        for caller in apps
        for called in apps
        if caller != called and allowed(manifests, caller, called, ports[called])
    }
    assert found == {
        *(("router", "draft"), ("router", "verify"), ("router", "redis")),
        *(("draft", "redis"), ("verify", "redis")),
    }


@pytest.mark.parametrize("overlay", ["gpu", "multi-gpu"])
def test_a_redis_outside_can_be_reached_and_is_trusted(overlay: str) -> None:
    (policy,) = [each for each in BUILT[overlay] if each["metadata"]["name"] == "external-redis"]
    (way,) = policy["spec"]["egress"]
    assert all("ipBlock" in peer for peer in way["to"])
    assert {each["port"] for each in way["ports"]} == {6379, 6380}
    (selected,) = policy["spec"]["podSelector"]["matchExpressions"]
    assert set(selected["values"]) == set(TIERS)
    maps = [each["data"] for each in BUILT[overlay] if each["kind"] == "ConfigMap"]
    data = {key: value for each in maps for key, value in each.items()}
    assert {data[f"SPECINFER_{tier.upper()}_REDIS_CA"] for tier in TIERS} == {
        "/run/secrets/redis/ca.crt"
    }


@pytest.mark.parametrize(("name", "template"), OUR_PODS)
def test_redis_is_where_the_secret_says(name: str, template: Manifest) -> None:
    (container,) = template["spec"]["containers"]
    env = {each["name"]: each for each in container["env"]}
    assert env[f"SPECINFER_{name.upper()}_REDIS"]["valueFrom"] == {
        "secretKeyRef": {"name": "specinfer-redis", "key": "url"}
    }
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounts["redis"] == "/run/secrets/redis"
    assert {"name": "redis", "secret": {"secretName": "specinfer-redis"}} in template["spec"][
        "volumes"
    ]


def test_the_rules_for_kubernetes_are_those_of_prometheus() -> None:
    module = import_module("tools.generate_rules")
    assert module.TARGET.read_text(encoding="utf-8") == module.manifest()


def test_dns_of_the_cluster_and_of_the_node_is_allowed() -> None:
    (policy,) = [each for each in BUILT["cpu"] if each["metadata"]["name"] == "dns"]
    (rule,) = policy["spec"]["egress"]
    assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in rule["to"]
    apps = [peer["podSelector"]["matchLabels"]["k8s-app"] for peer in rule["to"] if len(peer) > 1]
    assert apps == ["kube-dns", "node-local-dns"]


def test_metrics_are_for_monitoring_alone() -> None:
    policies = {
        each["metadata"]["name"]: each for each in BUILT["cpu"] if each["kind"] == "NetworkPolicy"
    }
    for tier in TIERS:
        for rule in policies[tier]["spec"]["ingress"]:
            ports = {each["port"] for each in rule["ports"]}
            (peer,) = rule["from"]
            labels = peer.get("namespaceSelector", {}).get("matchLabels", {})
            monitoring = labels.get("kubernetes.io/metadata.name") == "monitoring"
            assert (SERVICES_OF_OURS[tier].metrics_port in ports) == monitoring


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_the_same(overlay: str) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    folder = ROOT / "deploy/kubernetes/overlays" / overlay
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

    def ordered(manifests: list[Manifest]) -> list[str]:
        return sorted(json.dumps(each, sort_keys=True) for each in manifests)

    assert ordered(list(yaml.safe_load_all(done.stdout))) == ordered(BUILT[overlay])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_budgets_services_and_monitors_find_pods(overlay: str) -> None:
    labels = [template["metadata"]["labels"] for _, template in templates(BUILT[overlay])]
    for manifest in BUILT[overlay]:
        spec = manifest.get("spec", {})
        if manifest["kind"] not in ("PodDisruptionBudget", "Service", "ServiceMonitor"):
            continue
        wanted = spec["selector"].get("matchLabels", spec["selector"])
        assert any(wanted.items() <= each.items() for each in labels), manifest["metadata"]
    budgets = [each for each in BUILT[overlay] if each["kind"] == "PodDisruptionBudget"]
    assert {each["metadata"]["name"] for each in budgets} == set(TIERS)
