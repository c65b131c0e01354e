"""What `kubectl kustomize` makes of a directory: the part of it that deploy/kuberay uses.

Anything else in a kustomization is refused, so that it cannot be passed over.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

LOCAL = "config.kubernetes.io/local-config"
"""Annotation of an object that only other objects are made from."""

_KNOWN = {"apiVersion", "kind", "resources", "images", "replacements", "patches"}


def render(directory: Path) -> list[dict[str, Any]]:
    """Return the objects that a directory's kustomization.yaml stands for."""
    objects = [one for one in _build(directory) if not _is_local(one)]
    return copy.deepcopy(objects)  # YAML's aliases made them share parts


def _build(directory: Path) -> list[dict[str, Any]]:
    kustomization = yaml.safe_load((directory / "kustomization.yaml").read_text("utf-8"))
    assert set(kustomization) <= _KNOWN, set(kustomization) - _KNOWN
    objects: list[dict[str, Any]] = []
    for name in kustomization["resources"]:
        path = directory / name
        objects += _build(path) if path.is_dir() else yaml.safe_load_all(path.read_text("utf-8"))
    for patch in kustomization.get("patches", []):  # kustomize, too, patches before it replaces
        for one in _select(objects, patch["target"]):
            _merge(one, yaml.safe_load(patch["patch"]))
    for replacement in kustomization.get("replacements", []):
        _replace(objects, replacement)
    for image in kustomization.get("images", []):
        for container in _containers(objects):
            name, _, tag = container["image"].partition(":")
            if name == image["name"]:
                container["image"] = f"{image['newName']}:{tag}"
    return objects


def _select(objects: list[dict[str, Any]], target: dict[str, str]) -> list[dict[str, Any]]:
    assert set(target) == {"kind"}
    return [one for one in objects if one["kind"] == target["kind"]]


def _merge(onto: dict[str, Any], patch: dict[str, Any]) -> None:
    for key, value in patch.items():
        assert not isinstance(value, list), f"{key}: lists are merged by rules of their own"
        if isinstance(value, dict) and isinstance(onto.get(key), dict):
            _merge(onto[key], value)
        else:
            onto[key] = value


def _replace(objects: list[dict[str, Any]], replacement: dict[str, Any]) -> None:
    source = dict(replacement["source"])
    path = source.pop("fieldPath").split(".")
    (value,) = _select(objects, source)
    value = _follow(value, path)
    for target in replacement["targets"]:
        for one in _select(objects, target["select"]):
            for field in target["fieldPaths"]:
                *parents, last = field.split(".")
                _follow(one, parents)[last] = copy.deepcopy(value)


def _follow(tree: Any, path: list[str]) -> Any:
    for key in path:
        tree = tree[int(key) if isinstance(tree, list) else key]
    return tree


def _containers(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield from tree.get("containers", [])
        tree = list(tree.values())
    if isinstance(tree, list):
        for value in tree:
            yield from _containers(value)


def _is_local(one: dict[str, Any]) -> bool:
    return LOCAL in one["metadata"].get("annotations", {})
