"""Knows where the mesh comes from: always a whole snapshot, plus a bell that rings when another may be there.

A snapshot that is not whole (a bad file, none, one without this node) is never handed on: the last good one
stays, and a Problem says so. Imports model, meshfile, inotify and state; never ovs, pyroute2 or kubernetes.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from ovsmesh.errors import Problem
from ovsmesh.file_watch import FileWatch
from ovsmesh.mesh.manifest import dump, parse
from ovsmesh.mesh.source import Snapshot
from ovsmesh.mesh.types import Mesh, MeshError
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir, read_regular, write_atomic

WRITE_GRACE = 2.0
"""Seconds that a writer may hold the mesh file open before it is read as it is."""
SAVE_AGAIN = 30.0
"""Seconds before a last-known-good that could not be written is tried again."""


_Signature = tuple[int, ...]


def last_good(store: Path, node: str) -> tuple[Mesh | None, float, tuple[Problem, ...]]:
    """The last good mesh of an earlier run, and since when it is; garbage in `store` is named and ignored."""
    try:
        data, found = read_regular(store)
        mesh, _ = parse(data, str(store))
    except FileNotFoundError:
        return None, 0.0, ()
    except (OSError, MeshError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        message = f"{store}: the last good mesh of an earlier run can't be used: {why}"
    else:
        if mesh.node(node) is not None:
            return mesh, found.st_mtime, ()
        message = f"{store}: the last good mesh of an earlier run has no node {node}, so it is not used"
    return None, 0.0, (Problem(Reason.LastGoodUnreadable, message),)


class FileSource:
    """The mesh from a file. `node` is self: a file without it is not followed.

    `state_dir` holds the last-known-good mesh (mesh.json).
    """

    def __init__(self, path: str | os.PathLike[str], state_dir: str | os.PathLike[str], node: str) -> None:
        self.path = Path(path)
        self.node = node
        self._store = StateDir(state_dir).mesh_file
        self._bell = FileWatch(self.path)
        self._seen: _Signature | None = None
        self._good: Mesh | None = None
        self._good_since = 0.0
        self._saved: Mesh | None = None
        self._save_problem: tuple[Problem, ...] = ()
        self._save_after = 0.0
        self._store_problem: tuple[Problem, ...] = ()
        self._read: Snapshot | None = None
        self._shown: Snapshot | None = None

    def fds(self) -> list[int]:
        return self._bell.fds()

    def drain(self) -> bool:
        return self._bell.drain()

    def close(self) -> None:
        self._bell.close()

    def snapshot(self) -> Snapshot:
        self._bell.drain()
        if self._read is None:
            self._load_store()
        if self._read is None or not 0 < self._bell.writing() < WRITE_GRACE:
            seen = self._signature()
            if self._read is None or seen is None or seen != self._seen:
                self._read = self._fresh(seen)
        problems = self._read.problems + self._store_problem + self._save_problem
        if self._bell.why_silent:
            message = f"{self.path}: changes are noticed late: {self._bell.why_silent}"
            problems += (Problem(Reason.MeshFileUnwatched, message),)
        shown = replace(self._read, problems=problems)
        if self._shown is None or self._shown != shown:
            self._shown = shown
        return self._shown

    def commit(self) -> tuple[Problem, ...]:
        if self._read is None or not self._read.confirmed or self._good is None or self._good is self._saved:
            return self._save_problem
        if self._save_problem and time.monotonic() < self._save_after:
            return self._save_problem
        try:
            write_atomic(self._store, dump(self._good))
        except OSError as error:
            message = f"{self._store}: the last good mesh can't be saved ({error.strerror}): a restart without a good "
            message += f"{self.path} would have none"
            self._save_problem = (Problem(Reason.StateUnwritable, message),)
            self._save_after = time.monotonic() + SAVE_AGAIN
        else:
            self._saved, self._save_problem, self._store_problem = self._good, (), ()
        return self._save_problem

    def _signature(self) -> _Signature | None:
        """What changes whenever the file does; None when it can't be looked at."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _load_store(self) -> None:
        self._good, self._good_since, self._store_problem = last_good(self._store, self.node)
        self._saved = self._good

    def _fresh(self, seen: _Signature | None) -> Snapshot:
        """Reads the file. What makes it unusable as a whole ends in the last good mesh and one Problem."""
        self._seen = None
        where = str(self.path)
        try:
            data, _ = read_regular(self.path)
        except OSError as error:
            return self._kept(Reason.MeshFileUnreadable, f"{where}: can't be read: {error.strerror or error}")
        try:
            mesh, problems = parse(data, where, self._good)
        except MeshError as error:
            # Read again at the next look if it changed while it was read.
            self._seen = seen if seen == self._signature() else None
            return self._kept(Reason.MeshFileInvalid, str(error))
        if seen != self._signature() and self._read is not None:
            return self._read
        self._seen = seen
        problems = tuple(p if p.node == self.node or not p.node else replace(p, fatal=False) for p in problems)
        if not mesh.nodes and not problems:
            message = f"{where}: spec.nodes is empty; an empty list never means that everyone has left"
            return self._kept(Reason.MeshFileEmpty, f"{message}. To take a host out, run `ovsmesh cleanup` on it")
        if mesh.node(self.node) is None:
            refused = any(p.node == self.node for p in problems)
            message = f"{where}: has no {'usable ' if refused else ''}entry for this node, {self.node}: "
            message += "mend it" if refused else "add it, give --node the name it has there, or run `ovsmesh cleanup`"
            return self._kept(Reason.SelfMissing, message, problems)
        self._good = mesh
        self._good_since = time.time()
        return Snapshot(mesh, problems, True, self._good_since)

    def _kept(self, reason: Reason, message: str, more: tuple[Problem, ...] = ()) -> Snapshot:
        if self._good is None:
            problem = Problem(reason, f"{message}. No earlier good mesh is known, so nothing is touched")
            return Snapshot(None, (problem, *more))
        stamp = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(self._good_since))
        nodes = len(self._good.nodes)
        problem = Problem(reason, f"{message}. Keeping the last good mesh, of {stamp} ({nodes} nodes)")
        return Snapshot(self._good, (problem, *more), False, self._good_since)
