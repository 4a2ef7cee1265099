"""The interface of whatever delivers the mesh: whole snapshots, and file descriptors that wake the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ovsmesh.errors import Problem
from ovsmesh.mesh.types import Mesh


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The mesh to build now, and what is wrong with where it came from."""

    mesh: Mesh | None
    """None until something whole was seen: touch nothing."""
    problems: tuple[Problem, ...] = ()
    confirmed: bool = False
    """True: the source says this now. False: it is the last that was good."""
    since: float = 0.0
    """When `mesh` was read whole from its source, in seconds since the epoch; 0 without a mesh."""


class Source(Protocol):
    """Where the mesh comes from. snapshot() is cheap when nothing changed, and then returns the same object."""

    def fds(self) -> list[int]:
        """Return the file descriptors to wait on for reading. They stay the same."""

    def drain(self) -> bool:
        """Read what made them readable; return whether snapshot() may now differ. Never blocks."""

    def snapshot(self) -> Snapshot:
        """Return the mesh as of now. Never raises for what a user can cause, never blocks."""

    def commit(self) -> tuple[Problem, ...]:
        """Keep the mesh of the last snapshot for the next start, if it is confirmed. Return what went wrong.

        Call it once the mesh is applied. What went wrong is in the snapshots that follow too.
        """

    def close(self) -> None:
        """Stop watching."""
