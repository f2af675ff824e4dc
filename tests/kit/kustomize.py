"""What `kustomize build` makes of our overlays, for as much of kustomize as they use.

Resources, components, namespace, image tags, JSON patches with a target, and `$patch: delete`.
Anything else in a kustomization raises, so that an overlay cannot outgrow this unseen.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
_KEYS = {
    *("apiVersion", "kind", "resources", "components", "namespace", "images", "patches"),
}


def build(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization, in order."""
    manifests: list[Manifest] = []
    _apply(folder, manifests)
    return manifests


def load(path: Path) -> list[Manifest]:
    """The documents of a file."""
    return [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each]


def _apply(folder: Path, manifests: list[Manifest]) -> None:
    (settings,) = load(folder / "kustomization.yaml")
    unknown = set(settings) - _KEYS
    assert not unknown, f"{folder}: this resolver does not know {unknown}"
    for name in settings.get("resources", ()):
        path = folder / name
        if path.is_dir():
            manifests += build(path)
        else:
            manifests += load(path)
    for name in settings.get("components", ()):
        _apply(folder / name, manifests)
    for patch in settings.get("patches", ()):
        _patch(patch, manifests)
    for image in settings.get("images", ()):
        _tag(manifests, image["name"], image["newTag"])
    if "namespace" in settings:
        for manifest in manifests:
            manifest["metadata"]["namespace"] = settings["namespace"]


def _patch(patch: dict[str, Any], manifests: list[Manifest]) -> None:
    body = yaml.safe_load(patch["patch"])
    if "target" not in patch:
        assert body.pop("$patch") == "delete", "only deletions go without a target"
        kept = [each for each in manifests if not _is(each, body["kind"], body["metadata"]["name"])]
        assert len(kept) == len(manifests) - 1, body
        manifests[:] = kept
        return
    target = patch["target"]
    (found,) = [each for each in manifests if _is(each, target["kind"], target["name"])]
    for operation in body:
        _operate(found, operation)


def _is(manifest: Manifest, kind: str, name: str) -> bool:
    return (manifest["kind"], manifest["metadata"]["name"]) == (kind, name)


def _operate(manifest: Manifest, operation: dict[str, Any]) -> None:
    """One operation of RFC 6902, on members of objects."""
    *parents, last = [
        part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]
    ]
    place: Any = manifest
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    assert isinstance(place, dict)
    assert operation["op"] in ("add", "replace"), operation
    assert (last in place) == (operation["op"] == "replace"), operation
    place[last] = deepcopy(operation["value"])


def _tag(node: Any, name: str, tag: str) -> None:
    if isinstance(node, dict):
        for container in node.get("containers", ()):
            if container["image"].partition(":")[0] == name:
                container["image"] = f"{name}:{tag}"
        for value in node.values():
            _tag(value, name, tag)
    elif isinstance(node, list):
        for value in node:
            _tag(value, name, tag)
