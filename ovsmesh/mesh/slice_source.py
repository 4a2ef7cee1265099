"""The mesh from MeshSlices, handed on only if every slice of one generation of settings is there.

While one is missing, or the API server is away, the last good mesh stays, over restarts too, and a Problem says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ovsmesh.errors import Problem
from ovsmesh.kube.client import Api
from ovsmesh.kube.reflector import SECONDS, SILENCE, Collection, Reflector
from ovsmesh.mesh.conflicts import settle_entries
from ovsmesh.mesh.last_good import LastGood
from ovsmesh.mesh.meshslice import MeshSlice, parse_slice, slice_name
from ovsmesh.mesh.source import Snapshot
from ovsmesh.mesh.types import Mesh, Node
from ovsmesh.names import DEFAULT_MESH, MESH_LABEL, MESH_SLICES
from ovsmesh.reasons import Reason
from ovsmesh.text import instead, listed
from ovsmesh.wakeup import Wakeup

GRACE = 0.5
"""Seconds that a start waits for an API server that says nothing; one that refuses is not waited for."""
_PASSING = frozenset({Reason.ApiUnavailable, Reason.MeshSlicesIncomplete})
"""Reasons that pass by themselves and leave this node as healthy as before. Each change of the mesh's settings
makes every agent see incomplete slices for a moment: a thousand MeshNodes must not be written for that."""


class _Incomplete(Exception):
    """The slices are not a whole mesh."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def whole(slices: Mapping[str, MeshSlice], mesh: str) -> list[MeshSlice]:
    """Return the slices that make up `mesh`, by index. Raises _Incomplete.

    A slice with a name that the controller does not give is ignored: someone else made it.
    """
    by_index = {found.index: found for name, found in slices.items() if name == slice_name(mesh, found.index)}
    if not by_index:
        message = f"there are no MeshSlices: is there a Mesh named {mesh}, and does the controller run?"
        raise _Incomplete(Reason.MeshSlicesMissing, message)
    if 0 not in by_index:
        raise _Incomplete(Reason.MeshSlicesIncomplete, "slice 0, which says how many there are, is missing")
    count = by_index[0].count
    missing = [str(index) for index in range(count) if index not in by_index]
    if missing:
        text = f"{len(missing)} of {count} slices are missing: {listed(missing, 5)}"
        raise _Incomplete(Reason.MeshSlicesIncomplete, text)
    found = [by_index[index] for index in range(max(count, 1))]
    for one in found:
        if one.problem:
            raise _Incomplete(Reason.MeshSlicesInvalid, one.problem)
    newest = max(by_index.values(), key=lambda one: one.generation)
    older = sum((one.generation, one.settings) != (newest.generation, newest.settings) for one in found)
    if older:
        message = f"{older} of {count} slices have not the settings of generation {newest.generation} yet"
        raise _Incomplete(Reason.MeshSlicesIncomplete, message)
    return found


def assemble(slices: Sequence[MeshSlice], last: Mesh | None) -> tuple[Mesh, tuple[Problem, ...]]:
    """Return the mesh that whole slices make, and what was refused of it; `last` as in manifest.parse()."""
    settings = slices[0].settings
    assert settings is not None
    entries: dict[str, Node | Problem] = {}
    # On its way from one slice to another a node may be in both: the one written last counts.
    for one in sorted(slices, key=lambda one: (len(one.resource_version), one.resource_version)):
        for entry in one.nodes:
            entries[entry.name if isinstance(entry, Node) else entry.node] = entry
    found = [(entry, 0) for entry in entries.values() if isinstance(entry, Node)]
    refused = [(entry, 0) for entry in entries.values() if isinstance(entry, Problem)]
    nodes, problems = settle_entries(found, refused, last, tuple(map(str, settings.cluster_cidrs)))
    mesh = Mesh(settings.cluster_cidrs, nodes, *settings[1:])
    return (last if last is not None and last == mesh else mesh), problems


class SliceSource:
    """The mesh from the MeshSlices of `mesh`. `node` is self: a mesh without it is not followed.

    `state_dir` holds the last-known-good mesh, in the format of FileSource.
    """

    def __init__(
        self,
        api: Api,
        state_dir: str | Path,
        node: str,
        mesh: str = DEFAULT_MESH,
        *,
        grace: float = GRACE,
        seconds: int = SECONDS,
        silence: float = SILENCE,
    ) -> None:
        self.node = node
        self._mesh = mesh
        self._server = api.server
        self._last = LastGood(state_dir, node, "the API server")
        self._wakeup = Wakeup()
        self._reflector: Reflector[MeshSlice] = Reflector(
            api, MESH_SLICES, parse_slice, self._wakeup, labels=f"{MESH_LABEL}={mesh}", seconds=seconds, silence=silence
        )
        self._versions: dict[str, str] = {}
        self._from: tuple[Collection[MeshSlice], bool] | None = None
        self._read = Snapshot(None)
        self._grace_over = time.monotonic() + grace
        self._timer = threading.Timer(grace, self._wakeup.wake)
        self._timer.daemon = True
        self._timer.start()
        self._reflector.start()

    def fds(self) -> list[int]:
        return [self._wakeup.fd]

    def drain(self) -> bool:
        return self._wakeup.clear()

    def close(self) -> None:
        self._timer.cancel()
        self._reflector.close()
        self._wakeup.close()

    def settled(self, timeout: float) -> bool:
        """Wait until it is known whether there is a mesh; return False after `timeout` seconds.

        If an earlier run left a mesh, the first refused request is enough to use that.
        """
        end = time.monotonic() + timeout
        waiting = threading.Event()
        while self._waiting(found := self._reflector.collection()) or (self._last.mesh is None and not found.synced):
            if time.monotonic() >= end:
                return False
            waiting.wait(0.01)
        return True

    def observed(self) -> dict[str, str]:
        """Return name → resourceVersion of the slices that the last snapshot was made of; {} for one from disk."""
        return dict(self._versions)

    @property
    def received(self) -> int:
        """Bytes of watch events so far."""
        return self._reflector.received

    def snapshot(self) -> Snapshot:
        self._wakeup.clear()
        found = self._reflector.collection()
        waiting = self._waiting(found)
        if self._from is None or found is not self._from[0] or waiting != self._from[1]:
            self._from = found, waiting
            self._read = self._now(found, waiting)
        return self._last.show(self._read)

    def commit(self) -> tuple[Problem, ...]:
        return self._last.save(self._read)

    # ------------------------------------------------------------ what a snapshot is made of

    def _waiting(self, found: Collection[MeshSlice]) -> bool:
        return not found.synced and not found.problem and time.monotonic() < self._grace_over

    def _now(self, found: Collection[MeshSlice], waiting: bool) -> Snapshot:
        if waiting:
            return Snapshot(None, (Problem(Reason.MeshWaiting, f"waits for {self._server}"),))
        if found.synced:
            return self._fresh(found)
        return self._kept(Reason.ApiUnavailable, f"no MeshSlices were read yet: {found.problem or 'no answer'}")

    def _fresh(self, found: Collection[MeshSlice]) -> Snapshot:
        try:
            slices = whole(found.items, self._mesh)
        except _Incomplete as error:
            return self._kept(error.reason, str(error))
        mesh, problems = assemble(slices, self._last.mesh)
        if mesh.node(self.node) is None:
            names = instead(self.node, (node.name for node in mesh.nodes))
            message = f"no MeshSlice has this node, {self.node}: the controller's Events on the Node say why; {names}"
            return self._kept(Reason.SelfMissing, message, problems)
        self._versions = {one.name: one.resource_version for one in slices}
        if found.problem:
            # They were whole when last heard of: still what is wanted, but nobody says so now.
            stamp = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(found.since))
            message = f"not current since {stamp}: {found.problem}"
            problems = (Problem(Reason.ApiUnavailable, message, fatal=False), *problems)
        return self._last.accept(mesh, problems, confirmed=not found.problem)

    def _kept(self, reason: Reason, message: str, more: tuple[Problem, ...] = ()) -> Snapshot:
        return self._last.keep(reason, message, more, fatal=False if reason in _PASSING else None)
