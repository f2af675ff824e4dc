"""Pools scale by signals that exist, that stay, and that are their own."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from specinfer.metrics.catalogue import CATALOGUE
from tests.contracts.test_kubernetes import BUILT, OVERLAYS
from tests.kit.kustomize import Manifest


def test_pools_scale_by_metrics_that_exist_and_by_two_signals() -> None:
    scaled = {
        each["metadata"]["name"]: each["spec"]
        for each in BUILT["gpu"]
        if each["kind"] == "ScaledObject"
    }
    assert set(scaled) == {"draft", "verify"}
    known = {metric.shown for metric in CATALOGUE}
    queries = {
        name: [trigger["metadata"]["query"] for trigger in spec["triggers"]]
        for name, spec in scaled.items()
    }
    for query in (query for many in queries.values() for query in many):
        names = re.findall(r"specinfer_\w+", query)
        assert names
        assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in names} <= known
    assert not set(queries["draft"]) & set(queries["verify"])


def scalers(manifests: list[Manifest]) -> set[tuple[str, str]]:
    """Kind and name of everything that an autoscaler scales."""
    targets = [
        each["spec"]["scaleTargetRef"]
        for each in manifests
        if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")
    ]
    return {(target["kind"], target["name"]) for target in targets}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_replicas_are_said_by_the_manifest_or_by_an_autoscaler(overlay: str) -> None:
    """By both, and each `kubectl apply` takes back what the autoscaler decided."""
    scaled = scalers(BUILT[overlay])
    sets = {
        (each["kind"], each["metadata"]["name"]): "replicas" in each["spec"]
        for each in BUILT[overlay]
        if each["kind"] in ("Deployment", "StatefulSet", "LeaderWorkerSet")
    }
    assert scaled <= set(sets)
    assert {name for name, said in sets.items() if not said} == scaled
    assert ("Deployment", "router") in scaled


# Rounds without a tree by reason, rounds with one, and the share that KEDA is to see. Counters of
# five minutes, by 15 s; another cluster is wholly late beside each.
SIGNALS = [
    pytest.param("0+0x20", "0+0x20", 0, id="idle"),
    pytest.param("0+30x20", "0+0x20", 1, id="every tree is late"),
    pytest.param("0+15x20", "0+45x20", 0.25, id="a quarter"),
    pytest.param("0+0x20", "0+30x20", 0, id="none"),
]


@pytest.mark.parametrize(("late", "drafted", "share"), SIGNALS)
def test_drafters_scale_by_rounds_without_a_tree(
    tmp_path: Path, late: str, drafted: str, share: float
) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    (spec,) = [
        each["spec"]
        for each in BUILT["gpu"]
        if each["kind"] == "ScaledObject" and each["metadata"]["name"] == "draft"
    ]
    query = spec["triggers"][0]["metadata"]["query"]
    of, root_only = "specinfer_spec_decode_num_drafts_total", "specinfer_root_only_rounds_total"
    series = {
        f'{root_only}{{namespace="specinfer",reason="deadline"}}': late,
        f'{root_only}{{namespace="specinfer",reason="disabled"}}': "0+60x20",
        f'{of}{{namespace="specinfer"}}': drafted,
        f'{root_only}{{namespace="other",reason="deadline"}}': "0+60x20",
        f'{of}{{namespace="other"}}': "0+0x20",
    }
    case = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": query, "eval_time": "5m", "exp_samples": [{"labels": "{}", "value": share}]}
        ],
    }
    file = tmp_path / "signal.yml"
    file.write_text(yaml.safe_dump({"rule_files": [], "tests": [case]}), encoding="utf-8")
    done = subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_queries_name_their_namespace_at_every_metric() -> None:
    for each in BUILT["gpu"]:
        if each["kind"] == "ScaledObject":
            for trigger in each["spec"]["triggers"]:
                selectors = re.findall(r"specinfer_\w+(\{[^}]*\})?", trigger["metadata"]["query"])
                named = f'namespace="{each["metadata"]["namespace"]}"'
                assert selectors
                assert all(named in selector for selector in selectors)
