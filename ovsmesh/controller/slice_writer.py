"""Writes of MeshSlices, remembered until the watch brings them back."""

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
"""Seconds after which what the watch says counts, whatever was written."""


class SliceWriter:
    """Writes the slices of one mesh, and corrects what the watch says of them by what was written since."""

    def __init__(self, api: Api, mesh: str) -> None:
        self._api, self._mesh = api, mesh
        self._written: dict[str, tuple[MeshSlice | None, float, MeshSlice | None]] = {}
        """Name → what was written (None: deleted), when, and what the watch said at that time."""
        self.refused = False
        """Whether the API server refused a slice in the last write()."""
        self._logged: set[str] = set()
        self.writes = 0
        self.conflicts = 0

    def current(self, watched: Mapping[str, MeshSlice]) -> dict[str, MeshSlice]:
        """Return the slices of all meshes as they are as far as is known."""
        found = dict(watched)
        late = time.monotonic() - _ECHO
        for name, (written, at, before) in list(self._written.items()):
            theirs = watched.get(name)
            if at < late or _newer(theirs, written, before):
                del self._written[name]
            elif written is None:
                found.pop(name, None)
            else:
                found[name] = written
        return found

    def forget(self) -> None:
        """Forget what was written: another controller has led since."""
        self._written.clear()

    def write(
        self,
        wanted: Sequence[Node],
        settings: MeshSettings,
        generation: int,
        watched: Mapping[str, MeshSlice],
        due: bool,
    ) -> tuple[int, bool]:
        """Make the slices say `wanted`, if that is `due`. Return the writes made, and whether nothing is left.

        One that is refused keeps no other from being written. Raises Unavailable, NotLeader.
        """
        there = self.current(watched)
        todo = assign(self._mesh, wanted, settings, generation, there.values())
        self.refused = False
        if todo and not due:
            return 0, False
        made, whole = 0, True
        for one in todo:
            try:
                answer = self._one(one)
            except Conflict as error:
                # Someone wrote since: read what is there now, and compare again.
                self.conflicts += 1
                whole = False
                log.info("slice %s was written by someone else meanwhile and is compared again: %s", one.name, error)
                self._read(one.name, watched)
                break
            except (Invalid, Forbidden) as error:
                self.conflicts += 1
                whole, self.refused = False, True
                if str(error) not in self._logged:
                    self._logged.add(str(error))
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

    def _read(self, name: str, watched: Mapping[str, MeshSlice]) -> None:
        try:
            answer: Object | None = self._api.get(path_of(MESH_SLICES, name))
        except NotFound:
            answer = None
        self._note(name, answer, watched)

    def _note(self, name: str, answer: Object | None, watched: Mapping[str, MeshSlice]) -> None:
        made = parse_slice(answer) if answer is not None else None
        self._written[name] = (made, time.monotonic(), watched.get(name))


def _newer(theirs: MeshSlice | None, written: MeshSlice | None, before: MeshSlice | None) -> bool:
    """Return whether the watch has come as far as what was written."""
    if written is None:
        return theirs is None or theirs != before
    if theirs is None:
        return before is not None  # deleted since
    try:
        return int(theirs.resource_version) >= int(written.resource_version)
    except ValueError:
        return theirs.resource_version == written.resource_version
