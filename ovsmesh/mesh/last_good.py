"""The last-known-good mesh: what a source hands out while its own is missing or bad, over restarts too."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from ovsmesh.errors import Problem
from ovsmesh.mesh.manifest import dump, parse
from ovsmesh.mesh.source import Snapshot
from ovsmesh.mesh.types import Mesh, MeshError
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir, read_regular, write_atomic

SAVE_AGAIN = 30.0
"""Seconds before a mesh that could not be written is tried again."""


class LastGood:
    """The last good mesh of one source, in memory and in the state directory (mesh.json).

    `node` is self: a mesh without it is of no use. `source` is what a restart may find missing, for messages.
    """

    def __init__(self, state_dir: str | os.PathLike[str], node: str, source: str) -> None:
        self.mesh: Mesh | None = None
        self.since = 0.0
        """When `mesh` was read whole from its source, in seconds since the epoch; 0 without a mesh."""
        self._file = StateDir(state_dir).mesh_file
        self._node, self._source = node, source
        self._load_problems: tuple[Problem, ...] = ()
        self._save_problems: tuple[Problem, ...] = ()
        self._save_after = 0.0
        self._shown: Snapshot | None = None
        self._saved: Mesh | None = None
        self._load()

    def _load(self) -> None:
        """Read what an earlier run saved; name what is wrong with it, and go on without."""
        try:
            data, found = read_regular(self._file)
            mesh, _ = parse(data, str(self._file))
        except FileNotFoundError:
            return
        except (OSError, MeshError) as error:
            message = f"can't be used: {error.strerror if isinstance(error, OSError) else error}"
        else:
            if mesh.node(self._node) is not None:
                self.mesh, self._saved, self.since = mesh, mesh, found.st_mtime
                return
            message = f"has no node {self._node}, so it is not used"
        text = f"{self._file}: the last good mesh of an earlier run {message}"
        self._load_problems = (Problem(Reason.LastGoodUnreadable, text),)

    def accept(self, mesh: Mesh, problems: tuple[Problem, ...], confirmed: bool = True) -> Snapshot:
        """Make `mesh` the last good one; return it as a snapshot, in which only this node's problems are fatal."""
        if confirmed or mesh is not self.mesh:
            self.mesh, self.since = mesh, time.time()
        return Snapshot(mesh, self.for_self(problems), confirmed, self.since)

    def for_self(self, problems: tuple[Problem, ...]) -> tuple[Problem, ...]:
        """Return `problems` with those of other nodes not fatal."""
        return tuple(p if p.node in ("", self._node) else replace(p, fatal=False) for p in problems)

    def keep(self, reason: Reason, message: str, more: tuple[Problem, ...] = (), fatal: bool | None = None) -> Snapshot:
        """Return the last good mesh as a snapshot, with the problem for which the source's own is not used."""
        if self.mesh is None:
            problem = Problem(reason, f"{message}. No earlier good mesh is known, so nothing is touched")
            return Snapshot(None, (problem, *self.for_self(more)))
        stamp = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(self.since))
        message = f"{message}. Keeping the last good mesh, of {stamp} ({len(self.mesh.nodes)} nodes)"
        return Snapshot(self.mesh, (Problem(reason, message, fatal=fatal), *self.for_self(more)), False, self.since)

    def show(self, snapshot: Snapshot, more: tuple[Problem, ...] = ()) -> Snapshot:
        """Return `snapshot` with `more` and the problems of the file; the same object while nothing changes."""
        shown = replace(snapshot, problems=(*snapshot.problems, *self._load_problems, *self._save_problems, *more))
        if self._shown is None or self._shown != shown:
            self._shown = shown
        return self._shown

    def save(self, snapshot: Snapshot | None) -> tuple[Problem, ...]:
        """Write the mesh for the next start, if `snapshot` is confirmed and it changed. Return what went wrong."""
        if snapshot is None or not snapshot.confirmed or self.mesh is None or self.mesh is self._saved:
            return self._save_problems
        if self._save_problems and time.monotonic() < self._save_after:
            return self._save_problems
        try:
            write_atomic(self._file, dump(self.mesh))
        except OSError as error:
            message = f"{self._file}: the last good mesh can't be saved ({error.strerror}): "
            message += f"a restart without {self._source} would have none"
            self._save_problems = (Problem(Reason.StateUnwritable, message),)
            self._save_after = time.monotonic() + SAVE_AGAIN
        else:
            self._saved, self._save_problems, self._load_problems = self.mesh, (), ()
        return self._save_problems
