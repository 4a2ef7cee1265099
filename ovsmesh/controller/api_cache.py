"""The controller's copies of the API's objects: the Mesh, Nodes, MeshSlices and MeshNodes. Only reads."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import NamedTuple

from ovsmesh.controller.membership import NODES, NodeView, parse_node
from ovsmesh.controller.mesh_writer import MeshView, parse_mesh
from ovsmesh.controller.node_conditions import AgentReport, parse_meshnode
from ovsmesh.kube.client import Api, name_of
from ovsmesh.kube.reflector import MISSHAPEN, Reflector
from ovsmesh.mesh.meshslice import MeshSlice, parse_slice
from ovsmesh.names import DEFAULT_MESH, MESH_NODES, MESH_SLICES, MESHES
from ovsmesh.wakeup import Wakeup

log = logging.getLogger("ovsmesh")

_CATCH_UP = 5.0
"""Seconds that the watch of Nodes may be behind a list; then it is started again."""


class Observed(NamedTuple):
    """What the copies hold at one time. A part that has not changed is the same object as before."""

    mesh: MeshView | None
    nodes: Mapping[str, NodeView]
    slices: Mapping[str, MeshSlice]
    reports: Mapping[str, AgentReport]

    def is_same(self, other: Observed | None) -> bool:
        """Return whether `other` holds the same objects."""
        return other is not None and all(a is b for a, b in zip(self, other, strict=True))


class _Target(NamedTuple):
    """How far the watch of Nodes must come in one term."""

    term: int
    wanted: Mapping[str, NodeView]
    then: Mapping[str, NodeView]
    since: float


class ApiCache:
    """Four reflectors, each in a thread of its own, that wake the loop when something changes."""

    def __init__(self, api: Api, wakeup: Wakeup) -> None:
        self._api, self._wakeup = api, wakeup
        self._meshes = Reflector(api, MESHES, parse_mesh, wakeup, fields=f"metadata.name={DEFAULT_MESH}")
        self._nodes = Reflector(api, NODES, parse_node, wakeup)
        self._slices = Reflector(api, MESH_SLICES, parse_slice, wakeup)
        self._reports = Reflector(api, MESH_NODES, parse_meshnode, wakeup)
        self._target: _Target | None = None

    def start(self) -> None:
        """Start to list and watch."""
        for one in (self._meshes, self._nodes, self._slices, self._reports):
            one.start()

    def close(self) -> None:
        """End all watches."""
        for one in (self._meshes, self._nodes, self._slices, self._reports):
            one.close()

    def observed(self) -> Observed:
        """Return what the copies hold now."""
        return Observed(
            self._meshes.collection().items.get(DEFAULT_MESH),
            self._nodes.collection().items,
            self._slices.collection().items,
            self._reports.collection().items,
        )

    def waiting(self) -> str:
        """Return what was not read whole yet; "" if all was."""
        found = {
            "Meshes": self._meshes.collection().synced,
            "Nodes": self._nodes.collection().synced,
            "MeshSlices": self._slices.collection().synced,
            "MeshNodes": self._reports.collection().synced,
        }
        return ", ".join(name for name, synced in found.items() if not synced)

    def caught_up(self, term: int) -> bool:
        """Return whether the copy of the Nodes is as new as a list made in this term. Raises ApiError.

        A new leader asks until it is: the previous leader's watch may have seen more than this one, if this hangs.
        """
        have = self._nodes.collection().items
        if self._target is None or self._target.term != term:
            found: dict[str, NodeView] = {}
            for item in (item for page in self._api.pages(NODES, 250) for item in page.items):
                name = name_of(item)
                try:
                    found[name] = parse_node(item)
                except MISSHAPEN:
                    # the watch says so, and keeps the last good state
                    if name in have:
                        found[name] = have[name]
            self._target = _Target(term, found, have, time.monotonic())
        _, wanted, then, since = self._target
        if all(have.get(n) == wanted.get(n) or have.get(n) != then.get(n) for n in wanted.keys() | then.keys()):
            self._target = None
            return True
        if time.monotonic() - since > _CATCH_UP:
            log.warning("the watch of Nodes is behind and is started again")
            self._nodes.close(0.1)
            self._nodes = Reflector(self._api, NODES, parse_node, self._wakeup)
            self._nodes.start()
            self._target = None
        return False
