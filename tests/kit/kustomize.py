"""What `kustomize build` makes of our overlays, for as much of kustomize as they use.

Resources, components, namespace, image tags, generated ConfigMaps, JSON patches with a target, and
`$patch: delete`. Anything else in a kustomization raises, so that an overlay cannot outgrow this
unseen; a test compares it with kustomize itself where that is installed.
"""

import hashlib
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
_GENERATED = "generated"
_KEYS = {
    *("apiVersion", "kind", "resources", "components", "namespace", "images", "patches"),
    *("configMapGenerator", "configurations"),
}
# What kustomize writes in a hash instead of digits and letters that could spell a word.
_SPELLING = str.maketrans("013ae", "ghkmt")


def build(folder: Path) -> list[Manifest]:
    """The manifests of a kustomization, in order; ConfigMaps bear the hash of their content."""
    manifests = _gather(folder)
    names = {}
    for manifest in manifests:
        if manifest.pop(_GENERATED, False):
            plain = manifest["metadata"]["name"]
            names[plain] = manifest["metadata"]["name"] = f"{plain}-{_hash(manifest)}"
    _rename(manifests, names)
    return manifests


def _gather(folder: Path) -> list[Manifest]:
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
            manifests += _gather(path)
        else:
            manifests += load(path)
    for name in settings.get("components", ()):
        _apply(folder / name, manifests)
    for generator in settings.get("configMapGenerator", ()):
        _generate(folder, generator, manifests)
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
    assert operation["op"] in ("add", "replace", "remove"), operation
    assert (last in place) == (operation["op"] != "add"), operation
    if operation["op"] == "remove":
        del place[last]
    else:
        place[last] = deepcopy(operation["value"])


def _generate(folder: Path, generator: dict[str, Any], manifests: list[Manifest]) -> None:
    assert set(generator) <= {"name", "behavior", "literals", "files"}, generator
    data = dict(literal.split("=", 1) for literal in generator.get("literals", ()))
    data |= {name: (folder / name).read_text("utf-8") for name in generator.get("files", ())}
    if generator.get("behavior", "create") == "merge":
        (found,) = [each for each in manifests if _is(each, "ConfigMap", generator["name"])]
        found["data"] |= data
        return
    metadata = {"name": generator["name"]}
    made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
    manifests.append({**made, _GENERATED: True})


def _hash(manifest: Manifest) -> str:
    known = {"data": manifest["data"], "kind": manifest["kind"], "name": ""}
    text = json.dumps(known, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10].translate(_SPELLING)


def _rename(node: Any, names: dict[str, str]) -> None:
    """Give whoever names a ConfigMap its whole name."""
    if isinstance(node, dict):
        for key in ("configMapRef", "configMap"):
            if key in node:
                node[key]["name"] = names.get(node[key]["name"], node[key]["name"])
    for value in node.values() if isinstance(node, dict) else node:
        if isinstance(value, dict | list):
            _rename(value, names)


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
