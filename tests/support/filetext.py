"""A mesh file on disk and the watch on it, for the tests of what reads it."""

from __future__ import annotations

import select
import time
from pathlib import Path

from ovsmesh.file_watch import FileWatch
from ovsmesh.mesh.file_source import FileSource
from ovsmesh.mesh.source import Snapshot

HEAD = "apiVersion: ovsmesh.io/v1alpha1\nkind: Mesh\nspec:\n  clusterCIDRs: [10.0.0.0/8]\n"


def text_of(*names: str, first: int = 1) -> str:
    nodes = [f"  - {{name: {n}, address: 192.0.2.{ord(n)}, podCIDRs: [10.{first}.{ord(n)}.0/24]}}\n" for n in names]
    return f"{HEAD}  nodes: {'[]' if not nodes else ''}\n{''.join(nodes)}"


def wakes(watch: FileWatch | FileSource, within: float = 2.0) -> bool:
    """Return whether the watch wakes, within `within` seconds."""
    until = time.monotonic() + within
    while (left := until - time.monotonic()) > 0:
        if select.select(watch.fds(), [], [], left)[0] and watch.drain():
            return True
    return False


def silent(watch: FileWatch | FileSource) -> bool:
    return not wakes(watch, within=0.05)


def members(snapshot: Snapshot) -> str:
    assert snapshot.mesh is not None
    return "".join(n.name for n in snapshot.mesh.nodes)


def by_rename(path: Path) -> None:
    new = path.with_name("new")
    new.write_text(text_of("a", "b", "c"))
    new.rename(path)
