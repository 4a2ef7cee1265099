"""Knows the mesh as MeshSlices: handed on only when every slice of one settings generation is there.

While they are not, or the API server is away, the last good mesh stays, over restarts too, and a Problem says so.
Imports kube, kubewatch, claims, meshfile, sources and state; never ovs or pyroute2.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ovsmesh.errors import Problem
from ovsmesh.kube.client import Api, Object
from ovsmesh.kube.reflector import SECONDS, SILENCE, Collection, Reflector, Wakeup
from ovsmesh.mesh.file_source import SAVE_AGAIN, last_good
from ovsmesh.mesh.manifest import MAX_CIDRS, dump, parse
from ovsmesh.mesh.source import Snapshot
from ovsmesh.mesh.types import Mesh, MeshError
from ovsmesh.mesh.validation import Claim, Refusal, claim, settle
from ovsmesh.names import API_VERSION, MESH, MESH_LABEL, MESH_SLICES
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir, write_atomic

GRACE = 0.5
"""Seconds that a start waits for an API server that says nothing; one that refuses is not waited for."""
_PASSING = frozenset({Reason.ApiUnavailable, Reason.MeshSlicesIncomplete})
"""Reasons that go by without this node's doing, so it is as healthy as before. Each change of the mesh's settings
makes every agent see incomplete slices for a moment: a thousand MeshNodes must not be written for that."""


@dataclass(frozen=True, slots=True)
class Part:
    """A MeshSlice, as it is kept. `nodes` are the arguments of claims.claim without the clusters, or a Refusal."""

    version: str
    index: int
    count: int
    generation: int
    settings: str
    """JSON, as equal settings are equal texts."""
    nodes: tuple[Entry | Refused, ...]


class Entry(NamedTuple):
    name: str
    address: str
    cidrs: tuple[str, ...]
    uid: str
    zone: str


class Refused(NamedTuple):
    """An entry that has not the shape of one."""

    name: str
    field: str
    message: str


def project(found: Object) -> Part:
    """What is kept of a MeshSlice. Raises KeyError, TypeError, ValueError where it is none."""
    spec, version = found["spec"], found["metadata"]["resourceVersion"]
    index, count, generation = spec["index"], spec["count"], spec["meshGeneration"]
    if not all(isinstance(number, int) and number >= 0 for number in (index, count, generation)):
        raise ValueError("index, count and meshGeneration are no numbers")
    if not isinstance(spec["settings"], dict):
        raise TypeError("spec.settings is no object")
    settings = json.dumps(spec["settings"], sort_keys=True)
    return Part(version, index, count, generation, settings, tuple(map(_entry, spec.get("nodes") or ())))


def _entry(node: Any) -> Entry | Refused:
    if not isinstance(node, dict) or not isinstance(node.get("name"), str):
        return Refused("?", "entry", "wanted an object with a name")
    name, address, cidrs = node["name"], node.get("address"), node.get("podCIDRs")
    uid, zone = node.get("uid") or "", node.get("zone") or ""
    if not all(isinstance(text, str) for text in (address, uid, zone)):
        return Refused(name, "address", "wanted strings for address, uid and zone")
    if not isinstance(cidrs, list) or not 0 < len(cidrs) <= MAX_CIDRS or not all(isinstance(c, str) for c in cidrs):
        return Refused(name, "podCIDRs", f"wanted a list of one to {MAX_CIDRS} CIDRs")
    return Entry(name, str(address), tuple(cidrs), str(uid), str(zone))


@lru_cache(maxsize=4)
def _settings(text: str) -> Mesh:
    """A mesh with these settings and no nodes, judged as a file's are. Raises MeshError."""
    given = {"apiVersion": API_VERSION, "kind": MESH, "spec": {**json.loads(text), "nodes": []}}
    return parse(json.dumps(given) + "\n", "MeshSlices")[0]


def lacking(parts: Mapping[str, Part]) -> tuple[Reason, str] | None:
    """Why these slices are not a whole mesh, as (reason, message); None when they are."""
    if not parts:
        return (
            Reason.MeshSlicesMissing,
            "there are no MeshSlices: is there a Mesh named default, and does the controller run?",
        )
    by_index: dict[int, Part] = {}
    for part in parts.values():
        by_index[part.index] = part
    first = by_index.get(0)
    if first is None:
        return Reason.MeshSlicesIncomplete, "slice 0, which says how many there are, is missing"
    missing = [str(index) for index in range(first.count) if index not in by_index]
    if missing:
        some = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        return Reason.MeshSlicesIncomplete, f"{len(missing)} of {first.count} slices are missing: {some}"
    newest = max(part.generation for part in parts.values())
    older = sum(by_index[index].generation < newest for index in range(first.count))
    if older:
        return (
            Reason.MeshSlicesIncomplete,
            f"{older} of {first.count} slices have not the settings of generation {newest} yet",
        )
    return None


def assemble(parts: Mapping[str, Part], last: Mesh | None) -> tuple[Mesh, tuple[Problem, ...]]:
    """The mesh that whole slices make, and what was refused of it; `last` as in meshfile.parse. Raises MeshError."""
    newest = max(parts.values(), key=lambda part: part.generation)
    count = next(part.count for part in parts.values() if part.index == 0)
    frame = _settings(newest.settings)
    clusters = tuple(map(str, frame.cluster_cidrs))
    entries: dict[str, Entry | Refused] = {}
    # on its way from one slice to another a node may be in both: the one written last holds
    for part in sorted(parts.values(), key=lambda part: (len(part.version), part.version)):
        if part.index < count:
            entries.update((entry.name, entry) for entry in part.nodes)
    found: list[tuple[Claim, int]] = []
    refused: list[tuple[Refusal, int]] = []
    for entry in entries.values():
        if isinstance(entry, Refused):
            refused.append((Refusal(Reason.NodeInvalid, entry.name, entry.field, "", entry.message), 0))
            continue
        good = claim(*entry[:3], entry.uid, entry.zone, clusters)
        if isinstance(good, Refusal):
            refused.append((good.about(entry.name), 0))
        else:
            found.append((good, 0))
    nodes, problems = settle(found, refused, last, clusters)
    mesh = replace(frame, nodes=nodes)
    return (last if last == mesh else mesh), problems


class SliceSource:
    """The mesh from the MeshSlices of `mesh`. `node` is self: a mesh without it is not followed.

    `state_dir` holds the last-known-good mesh, in the format that FileSource reads and writes too.
    """

    def __init__(
        self,
        api: Api,
        state_dir: str | Path,
        node: str,
        mesh: str = "default",
        *,
        grace: float = GRACE,
        seconds: int = SECONDS,
        silence: float = SILENCE,
    ) -> None:
        self.node = node
        self._server = api.config.server
        self._store = StateDir(state_dir).mesh_file
        self._bell = Wakeup()
        labels = f"{MESH_LABEL}={mesh}"
        self._reflector: Reflector[Part] = Reflector(
            api, MESH_SLICES, project, self._bell, labels=labels, seconds=seconds, silence=silence
        )
        self._good: Mesh | None = None
        self._good_since = 0.0
        self._versions: dict[str, str] = {}
        self._saved: Mesh | None = None
        self._saved_at = 0.0
        self._save_problem: tuple[Problem, ...] = ()
        self._store_problem: tuple[Problem, ...] = ()
        self._from: tuple[Collection[Part], bool] | None = None
        self._read = Snapshot(None)
        self._shown: Snapshot | None = None
        self._grace_over = time.monotonic() + grace
        self._load_store()
        self._timer = threading.Timer(grace, self._bell.wake)
        self._timer.daemon = True
        self._timer.start()
        self._reflector.start()

    def fds(self) -> list[int]:
        return [self._bell.fd]

    def drain(self) -> bool:
        return self._bell.clear()

    def close(self) -> None:
        self._timer.cancel()
        self._reflector.close()
        self._bell.close()

    def settled(self, timeout: float) -> bool:
        """Waits until there is a mesh or the word that there is none; False after `timeout` seconds.

        Where an earlier run has left a mesh, the first refusal is word enough.
        """
        end = time.monotonic() + timeout
        waiting = threading.Event()
        while self._waiting(look := self._reflector.collection()) or (self._good is None and not look.synced):
            if time.monotonic() >= end:
                return False
            waiting.wait(0.01)
        return True

    def observed(self) -> dict[str, str]:
        """Name → resourceVersion of the slices that the mesh of the last snapshot was made of; {} for one from disk."""
        return dict(self._versions)

    @property
    def received(self) -> int:
        """Bytes of watch events so far."""
        return self._reflector.received

    def snapshot(self) -> Snapshot:
        self._bell.clear()
        look = self._reflector.collection()
        waiting = self._waiting(look)
        if self._from is None or look is not self._from[0] or waiting != self._from[1]:
            self._from = look, waiting
            self._read = self._now(look, waiting)
        shown = replace(self._read, problems=self._read.problems + self._store_problem + self._save_problem)
        if self._shown is None or self._shown != shown:
            self._shown = shown
        return self._shown

    def commit(self) -> tuple[Problem, ...]:
        good = self._good
        if not self._read.confirmed or good is None or good is self._saved:
            return self._save_problem
        if self._save_problem and time.monotonic() < self._saved_at + SAVE_AGAIN:
            return self._save_problem
        self._saved_at = time.monotonic()
        try:
            write_atomic(self._store, dump(good))
        except OSError as error:
            message = f"{self._store}: the last good mesh can't be saved ({error.strerror}): a restart while the API "
            self._save_problem = (Problem(Reason.StateUnwritable, message + "server is away would have none"),)
        else:
            self._saved, self._save_problem, self._store_problem = good, (), ()
        return self._save_problem

    # ------------------------------------------------------------ what a snapshot is made of

    def _waiting(self, look: Collection[Part]) -> bool:
        return not look.synced and not look.problem and time.monotonic() < self._grace_over

    def _now(self, look: Collection[Part], waiting: bool) -> Snapshot:
        if waiting:
            return Snapshot(None, (Problem(Reason.MeshWaiting, f"waits for {self._server}"),))
        if look.synced:
            return self._fresh(look)
        return self._kept(Reason.ApiUnavailable, f"no MeshSlices were read yet: {look.problem or 'no answer'}")

    def _load_store(self) -> None:
        self._good, self._good_since, self._store_problem = last_good(self._store, self.node)
        self._saved = self._good

    def _fresh(self, look: Collection[Part]) -> Snapshot:
        why = lacking(look.items)
        if why:
            return self._kept(*why)
        try:
            mesh, problems = assemble(look.items, self._good)
        except MeshError as error:
            return self._kept(Reason.MeshSlicesInvalid, str(error))
        problems = tuple(p if p.node == self.node or not p.node else replace(p, fatal=False) for p in problems)
        if mesh.node(self.node) is None:
            message = f"no MeshSlice has this node, {self.node}: the controller's Events on the Node say why"
            return self._kept(Reason.SelfMissing, message, problems)
        if mesh is not self._good or not self._versions:
            self._good_since = time.time()
        self._good = mesh
        self._versions = {name: part.version for name, part in look.items.items()}
        if look.problem:
            # they were whole when last heard of: still what is wanted, but no one says so now
            stamp = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(look.since))
            message = f"not current since {stamp}: {look.problem}"
            problems = (Problem(Reason.ApiUnavailable, message, fatal=False), *problems)
        return Snapshot(mesh, problems, not look.problem, self._good_since)

    def _kept(self, reason: Reason, message: str, more: tuple[Problem, ...] = ()) -> Snapshot:
        if self._good is None:
            problem = Problem(reason, f"{message}. No earlier good mesh is known, so nothing is touched")
            return Snapshot(None, (problem, *more))
        stamp = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(self._good_since))
        nodes = len(self._good.nodes)
        message = f"{message}. Keeping the last good mesh, of {stamp} ({nodes} nodes)"
        return Snapshot(
            self._good, (Problem(reason, message, fatal=reason not in _PASSING), *more), False, self._good_since
        )
