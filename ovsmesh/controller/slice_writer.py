"""Writes MeshSlices, and knows what it wrote before the watch tells of it. Imports kube and slices."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence

from ovsmesh.controller.slice_layout import Write, assign
from ovsmesh.kube.client import Api, Conflict, Forbidden, Invalid, NotFound, Object, path_of
from ovsmesh.mesh.meshslice import MeshSlice, labels, parse_slice
from ovsmesh.mesh.types import MeshSettings, Node
from ovsmesh.names import API_VERSION, MESH_SLICE, MESH_SLICES

log = logging.getLogger("ovsmesh")

_ECHO = 10.0
"""Seconds after which what the watch says counts, whatever we think that we wrote."""


class SliceWriter:
    """What a reflector says of the slices, corrected by what was written since; and the writes."""

    def __init__(self, api: Api, mesh: str) -> None:
        self._api, self._mesh = api, mesh
        self._ours: dict[str, tuple[MeshSlice | None, float, MeshSlice | None]] = {}
        """Name → what we wrote (None: deleted), when, and what the watch said at that time."""
        self.refused = False
        """Whether the last write() met a slice that the API server does not take."""
        self._said: set[str] = set()
        self.writes = 0
        self.conflicts = 0

    def now(self, watched: Mapping[str, MeshSlice]) -> dict[str, MeshSlice]:
        """The slices of all meshes as they are as far as we know."""
        found = dict(watched)
        late = time.monotonic() - _ECHO
        for name, (ours, at, before) in list(self._ours.items()):
            theirs = watched.get(name)
            if at < late or _newer(theirs, ours, before):
                del self._ours[name]
            elif ours is None:
                found.pop(name, None)
            else:
                found[name] = ours
        return found

    def forget(self) -> None:
        self._ours.clear()

    def write(
        self,
        wanted: Sequence[Node],
        settings: MeshSettings,
        generation: int,
        watched: Mapping[str, MeshSlice],
        due: bool,
    ) -> tuple[int, bool]:
        """Brings the slices to `wanted`, if it is `due`: writes made, and whether all is said then.

        One that is refused keeps no other from being written. Raises Unavailable, NotLeader.
        """
        there = self.now(watched)
        todo = assign(self._mesh, wanted, settings, generation, there.values())
        self.refused = False
        if todo and not due:
            return 0, False
        made, whole = 0, True
        for one in todo:
            try:
                answer = self._one(one)
            except Conflict as error:
                # Someone wrote since: look at what is there now, and think again.
                self.conflicts += 1
                whole = False
                log.info("slice %s: %s", one.name, error)
                self._look(one.name, watched)
                break
            except (Invalid, Forbidden) as error:
                self.conflicts += 1
                whole, self.refused = False, True
                if str(error) not in self._said:
                    self._said.add(str(error))
                    log.error("slice %s: %s", one.name, error)
                continue
            self._note(one.name, answer, watched)
            made += 1
            self.writes += 1
        return made, whole

    def _one(self, write: Write) -> Object | None:
        path = path_of(MESH_SLICES, write.name)
        if write.spec is None:
            with contextlib.suppress(NotFound):
                self._api.delete(path, version=write.resource_version)
            return None
        if not write.resource_version:
            meta = {"name": write.name, "labels": labels(self._mesh)}
            body = {"apiVersion": API_VERSION, "kind": MESH_SLICE, "metadata": meta, "spec": write.spec}
            return self._api.create(MESH_SLICES, body)
        body = {"metadata": {"resourceVersion": write.resource_version, "labels": labels(self._mesh)}}
        try:
            return self._api.patch(path, body | {"spec": write.spec})
        except NotFound as error:
            raise Conflict(str(error), 404, "NotFound") from None

    def _look(self, name: str, watched: Mapping[str, MeshSlice]) -> None:
        try:
            answer: Object | None = self._api.get(path_of(MESH_SLICES, name))
        except NotFound:
            answer = None
        self._note(name, answer, watched)

    def _note(self, name: str, answer: Object | None, watched: Mapping[str, MeshSlice]) -> None:
        made = parse_slice(answer) if answer is not None else None
        self._ours[name] = (made, time.monotonic(), watched.get(name))


def _newer(theirs: MeshSlice | None, ours: MeshSlice | None, before: MeshSlice | None) -> bool:
    """Whether the watch has come as far as what we wrote."""
    if ours is None:
        return theirs is None or theirs != before
    if theirs is None:
        return before is not None  # deleted since
    try:
        return int(theirs.resource_version) >= int(ours.resource_version)
    except ValueError:
        return theirs.resource_version == ours.resource_version
