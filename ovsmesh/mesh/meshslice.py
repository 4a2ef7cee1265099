"""The MeshSlice format: the part of a mesh that one object carries, read from the API and written to it.

One parser for both sides. What is wrong in a slice is part of the result: an agent refuses it by name, and the
controller, which compares with what it wants, writes it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ovsmesh.errors import Problem
from ovsmesh.mesh.manifest import NODE_KEYS, dump_node, dump_settings, parse_entry, parse_settings
from ovsmesh.mesh.types import MeshError, MeshSettings, Node
from ovsmesh.names import MESH_LABEL

MOST = 100
"""Nodes in a slice, as EndpointSlice has it: one change sends about 15 KB to each agent."""
MANAGED_BY = "ovsmesh-controller"
_REQUIRED = frozenset(("clusterCIDRs", "encapsulation", "mtu"))
"""Settings that the controller always writes."""


@dataclass(frozen=True, slots=True)
class MeshSlice:
    """A MeshSlice as it was read. A number that is missing or wrong is -1, a count 0."""

    name: str
    mesh: str
    index: int
    count: int
    generation: int
    settings: MeshSettings | None
    nodes: tuple[Node | Problem, ...]
    resource_version: str
    labelled: bool = True
    problem: str = ""
    """Why it can't be used as a whole; "" if it can."""

    @property
    def members(self) -> tuple[Node, ...]:
        """The nodes that can be used."""
        return tuple(node for node in self.nodes if isinstance(node, Node))


def slice_name(mesh: str, index: int) -> str:
    """Return the name of the slice with this index."""
    return f"{mesh}-{index:03d}"


def labels(mesh: str) -> dict[str, str]:
    """Return the labels of each slice of `mesh`."""
    return {MESH_LABEL: mesh, "app.kubernetes.io/managed-by": MANAGED_BY}


def parse_slice(found: Mapping[str, Any]) -> MeshSlice:
    """Return a MeshSlice object as a MeshSlice, whatever is in it. Its nodes are judged by its own cluster CIDRs."""
    meta, spec = _map(found.get("metadata")), _map(found.get("spec"))
    name, mesh, has = _text(meta.get("name")), _text(spec.get("mesh")), _map(meta.get("labels"))
    index, count = _number(spec.get("index"), -1), _number(spec.get("count"), 0)
    generation = _number(spec.get("meshGeneration"), -1)
    settings: MeshSettings | None = None
    clusters: tuple[str, ...] = ()
    problem = ""
    try:
        settings = parse_settings(spec.get("settings"), f"MeshSlice {name}")
        clusters = tuple(map(str, settings.cluster_cidrs))
        if not spec["settings"].keys() >= _REQUIRED:
            problem = f"MeshSlice {name}: wanted all of {', '.join(sorted(_REQUIRED))} in spec.settings"
    except MeshError as error:
        problem = str(error)
    if index < 0 or count < 1 or generation < 0:
        problem = f"MeshSlice {name}: wanted numbers for index, count and meshGeneration"
    given = spec.get("nodes")
    entries = given if isinstance(given, list) else []
    nodes = tuple(parse_entry(_without_unknown(entry), place, clusters) for place, entry in enumerate(entries))
    labelled = all(has.get(key) == value for key, value in labels(mesh).items())
    version = _text(meta.get("resourceVersion"))
    return MeshSlice(name, mesh, index, count, generation, settings, nodes, version, labelled, problem)


def _without_unknown(entry: object) -> object:
    """Leave out what a newer controller may say of a node."""
    if not isinstance(entry, dict) or entry.keys() <= NODE_KEYS:
        return entry
    return {key: value for key, value in entry.items() if key in NODE_KEYS}


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _number(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else otherwise


def slice_spec(
    mesh: str, index: int, count: int, generation: int, settings: MeshSettings, nodes: Iterable[Node]
) -> dict[str, Any]:
    """Return the spec of a slice as it is written."""
    return {
        "mesh": mesh,
        "index": index,
        "count": count,
        "meshGeneration": generation,
        "settings": dump_settings(settings),
        "nodes": [dump_node(node) for node in nodes],
    }
