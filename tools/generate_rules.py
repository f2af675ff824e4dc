"""Write the rules of deploy/prometheus as a PrometheusRule for Kubernetes; `--check` only compares.

Kustomize reads no file outside of its own folders, so the operator's copy is made here. This module
knows nothing of what the rules say.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from tools.generated_file import write_or_check

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "deploy/prometheus/rules"
TARGET = ROOT / "deploy/kubernetes/components/monitoring/prometheus-rule.yaml"
HEAD = "# Made from deploy/prometheus/rules by `python tools/generate_rules.py`; do not edit it.\n"


def main() -> int:
    """Write the file, or with `--check` say whether it is what would be written."""
    return write_or_check(TARGET, manifest(), "tools/generate_rules.py")


def manifest() -> str:
    """The whole manifest: the groups of every file, in the order of the files' names."""
    files = sorted(RULES.glob("*.yml"))
    groups = [
        # A group's name counts within its file, and here there is one file.
        {**group, "name": f"{group['name']}-{path.stem}"}
        for path in files
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    ]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "specinfer"},
        "spec": {"groups": groups},
    }
    return HEAD + yaml.safe_dump(rule, sort_keys=False, width=1000)


if __name__ == "__main__":
    sys.exit(main())
