"""The MeshSlice format: the part of a mesh that one object carries, read from the API and written to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ovsmesh.mesh.types import Mesh
from ovsmesh.names import MESH_LABEL

MOST = 100
"""Nodes in a slice, as EndpointSlice has it: one change sends about 15 KB to each agent."""
MANAGED_BY = "ovsmesh-controller"


class Entry(NamedTuple):
    """A member as slices carry it. `address` and `pod_cidrs` are texts in canonical form."""

    name: str
    uid: str
    address: str
    pod_cidrs: tuple[str, ...]
    zone: str = ""


class MeshSettings(NamedTuple):
    """What all members must agree on."""

    cluster_cidrs: tuple[str, ...]
    encapsulation: str = "gre"
    key: int | None = None
    mtu: int | None = None


@dataclass(frozen=True, slots=True)
class MeshSlice:
    """A MeshSlice as it was read."""

    name: str
    mesh: str
    index: int
    count: int
    generation: int
    settings: MeshSettings | None
    nodes: tuple[Entry, ...]
    resource_version: str
    labelled: bool = True


def slice_name(mesh: str, index: int) -> str:
    return f"{mesh}-{index:03d}"


def settings_of(mesh: Mesh) -> MeshSettings:
    return MeshSettings(tuple(map(str, mesh.cluster_cidrs)), mesh.encapsulation, mesh.key, mesh.mtu)


def labels(mesh: str) -> dict[str, str]:
    return {MESH_LABEL: mesh, "app.kubernetes.io/managed-by": MANAGED_BY}


def parse_slice(found: Mapping[str, Any]) -> MeshSlice:
    """A MeshSlice object as a MeshSlice; what has not the right shape is left out, so that it is written anew."""
    meta = _map(found.get("metadata"))
    spec = _map(found.get("spec"))
    mesh = _text(spec.get("mesh"))
    has = _map(meta.get("labels"))
    return MeshSlice(
        _text(meta.get("name")),
        mesh,
        _number(spec.get("index"), -1),
        _number(spec.get("count"), 0),
        _number(spec.get("meshGeneration"), 0),
        _settings(_map(spec.get("settings"))),
        tuple(_entry(_map(node)) for node in _list(spec.get("nodes"))),
        _text(meta.get("resourceVersion")),
        all(has.get(key) == value for key, value in labels(mesh).items()),
    )


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _number(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _entry(node: Mapping[str, Any]) -> Entry:
    cidrs = tuple(_text(cidr) for cidr in _list(node.get("podCIDRs")))
    return Entry(
        _text(node.get("name")), _text(node.get("uid")), _text(node.get("address")), cidrs, _text(node.get("zone"))
    )


def _settings(given: Mapping[str, Any]) -> MeshSettings | None:
    clusters = tuple(_text(cidr) for cidr in _list(given.get("clusterCIDRs")))
    key, mtu = given.get("key"), given.get("mtu")
    if not clusters:
        return None
    return MeshSettings(
        clusters,
        _text(given.get("encapsulation")),
        None if key is None else _number(key, -1),
        None if mtu == "auto" else _number(mtu, -1),
    )


def slice_spec(
    mesh: str, index: int, count: int, generation: int, settings: MeshSettings, nodes: Iterable[Entry]
) -> Any:
    """The spec as written. A key of None is said as null, so that a merge patch takes an old one away."""
    return {
        "mesh": mesh,
        "index": index,
        "count": count,
        "meshGeneration": generation,
        "settings": {
            "clusterCIDRs": list(settings.cluster_cidrs),
            "encapsulation": settings.encapsulation,
            "key": settings.key,
            "mtu": "auto" if settings.mtu is None else settings.mtu,
        },
        "nodes": [_dump(entry) for entry in nodes],
    }


def _dump(entry: Entry) -> dict[str, Any]:
    made: dict[str, Any] = {"name": entry.name, "address": entry.address, "podCIDRs": list(entry.pod_cidrs)}
    if entry.uid:
        made["uid"] = entry.uid
    if entry.zone:
        made["zone"] = entry.zone
    return made
