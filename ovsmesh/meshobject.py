"""The Mesh object: what it wants, checked as a mesh file is, and what it is told in return (status, Events).

Imports meshfile, reports, kube and kubeevents.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ovsmesh.kube import GROUP, Api, Conflict, NotFound, Object, path_of
from ovsmesh.kubeevents import About, Events
from ovsmesh.meshfile import API_VERSION, parse
from ovsmesh.model import Mesh, MeshError, Problem
from ovsmesh.reports import mesh_status
from ovsmesh.roster import Roster

log = logging.getLogger("ovsmesh")

MESH = "default"
MESHES = f"{GROUP}/meshes"
_PAUSE = 1.0
"""Seconds between two writes of the status."""
IDLE = 30.0


@dataclass(frozen=True, slots=True)
class MeshView:
    """The Mesh object as it was read."""

    uid: str
    generation: int
    spec: dict[str, Any]
    status: dict[str, Any]

    @property
    def allocates(self) -> bool:
        return self.spec.get("allocatePodCIDRs") is True

    @property
    def subnet_length(self) -> int | None:
        asked = self.spec.get("nodeSubnetLength")
        return asked if isinstance(asked, int) else None


def project(found: Object) -> MeshView:
    meta = found["metadata"]
    return MeshView(meta.get("uid", ""), meta.get("generation", 0), found.get("spec") or {}, found.get("status") or {})


class MeshObject:
    """`take` a view, then `mesh` is the last good Mesh and `problems` what is wrong with the view."""

    def __init__(self, api: Api, events: Events) -> None:
        self._api, self._events = api, events
        self.mesh: Mesh | None = None
        self.problems: tuple[Problem, ...] = ()
        self._text = ""
        self._told: set[str] = set()
        self._written: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        self._next = 0.0

    def take(self, view: MeshView) -> None:
        text = json.dumps({"apiVersion": API_VERSION, "kind": "Mesh", "spec": view.spec})
        if text == self._text:
            return
        self._text = text
        try:
            self.mesh, self.problems = parse(text, f"Mesh {MESH}")
        except MeshError as error:
            self.problems = (Problem("MeshInvalid", f"{error}; the slices stay as they are"),)

    def forget(self) -> None:
        """Another has led meanwhile."""
        self._told, self._written = set(), ({}, {})

    def warn(self, view: MeshView, problems: Iterable[Problem]) -> None:
        """Events about the Mesh itself, once for each text as long as it stays true."""
        now = {str(problem): problem for problem in (*self.problems, *problems)}
        for text, problem in now.items():
            if text not in self._told:
                log.warning("%s", problem)
                self._events.emit(About(API_VERSION, "Mesh", MESH, view.uid), problem.reason, text)
        self._told = set(now)

    def tell(self, view: MeshView, roster: Roster, converged: int, now: float) -> float:
        """Writes the status where it says something else; returns when it wants to be called again, in seconds."""
        at, ours = self._written
        # until our own write has come back through the watch
        before = ours if ours and at is view.status else view.status
        wanted = mesh_status(roster, converged, view.generation, self.problems, before, time.time())
        if wanted == before:
            return IDLE
        if now < self._next:
            return self._next - now
        self._next = now + _PAUSE
        try:
            self._api.patch(path_of(MESHES, MESH, "status"), {"metadata": {"uid": view.uid}, "status": wanted})
        except (Conflict, NotFound) as error:
            log.info("Mesh %s: status not written: %s", MESH, error)
            return _PAUSE
        self._written = (view.status, wanted)
        return IDLE
