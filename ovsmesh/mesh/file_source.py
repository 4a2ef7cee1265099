"""The mesh from a file, read again whenever it changes.

A file that is not whole (unreadable, bad, empty, without this node) is never handed on: the last good mesh stays,
and a Problem says so.
"""

from __future__ import annotations

import os
from pathlib import Path

from ovsmesh.errors import Problem
from ovsmesh.file_watch import FileWatch
from ovsmesh.mesh.last_good import LastGood
from ovsmesh.mesh.manifest import parse
from ovsmesh.mesh.source import Snapshot
from ovsmesh.mesh.types import MeshError
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import read_regular
from ovsmesh.text import instead

WRITE_GRACE = 2.0
"""Seconds that a writer may hold the mesh file open before it is read as it is."""

_Signature = tuple[int, ...]


class FileSource:
    """The mesh from the file `path`. `node` is self: a file without it is not followed.

    `state_dir` holds the last-known-good mesh.
    """

    def __init__(self, path: str | os.PathLike[str], state_dir: str | os.PathLike[str], node: str) -> None:
        self.path = Path(path)
        self.node = node
        self._last = LastGood(state_dir, node, f"a good {path}")
        self._watch = FileWatch(self.path)
        self._seen: _Signature | None = None
        self._read: Snapshot | None = None

    def fds(self) -> list[int]:
        return self._watch.fds()

    def drain(self) -> bool:
        return self._watch.drain()

    def close(self) -> None:
        self._watch.close()

    def snapshot(self) -> Snapshot:
        self._watch.drain()
        if self._read is None or not 0 < self._watch.writing() < WRITE_GRACE:
            seen = self._signature()
            if self._read is None or seen is None or seen != self._seen:
                self._read = self._fresh(seen)
        more: tuple[Problem, ...] = ()
        if self._watch.why_silent:
            message = f"{self.path}: changes are noticed late: {self._watch.why_silent}"
            more = (Problem(Reason.MeshFileUnwatched, message),)
        return self._last.show(self._read, more)

    def commit(self) -> tuple[Problem, ...]:
        return self._last.save(self._read)

    def _signature(self) -> _Signature | None:
        """Return what changes whenever the file does; None if it can't be looked at."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _fresh(self, seen: _Signature | None) -> Snapshot:
        """Read the file. What makes it unusable as a whole ends in the last good mesh and one Problem."""
        self._seen = None
        where = str(self.path)
        try:
            data, _ = read_regular(self.path)
        except OSError as error:
            return self._last.keep(Reason.MeshFileUnreadable, f"{where}: can't be read: {error.strerror or error}")
        try:
            mesh, problems = parse(data, where, self._last.mesh)
        except MeshError as error:
            # Read again at the next look if it changed while it was read.
            self._seen = seen if seen == self._signature() else None
            return self._last.keep(Reason.MeshFileInvalid, str(error))
        if seen != self._signature() and self._read is not None:
            return self._read
        self._seen = seen
        if not mesh.nodes and not problems:
            message = f"{where}: spec.nodes is empty; an empty list never means that everyone has left"
            return self._last.keep(Reason.MeshFileEmpty, f"{message}. To take a host out, run `ovsmesh cleanup` on it")
        if mesh.node(self.node) is None:
            refused = any(p.node == self.node for p in problems)
            message = f"{where}: has no {'usable ' if refused else ''}entry for this node, {self.node}: "
            names = instead(self.node, (node.name for node in mesh.nodes))
            advice = f"{names}. Give --node the name it has there, add it, or run `ovsmesh cleanup`"
            return self._last.keep(Reason.SelfMissing, message + ("correct it" if refused else advice), problems)
        return self._last.accept(mesh, problems)
