"""The controller: one loop that reads whole snapshots (Mesh, Nodes, MeshSlices, MeshNodes) and writes what differs.

Level-triggered: a bell only makes it turn sooner. It writes as long as it holds the Lease, slices first, and
never from a copy that is not whole. Joins kube… with the pure rooms; never imports ovs, pyroute2 or kubernetes.
"""

from __future__ import annotations

import logging
import os
import random
import select
import socket
import time
from collections.abc import Iterable, Mapping

from ovsmesh.controller import node_conditions, slice_layout
from ovsmesh.controller.garbage_collector import GarbageCollector
from ovsmesh.controller.http import ControllerHttp, Counts
from ovsmesh.controller.membership import MEMBERSHIP_FIELDS, Membership, NodeView, membership_of, parse_node
from ovsmesh.controller.mesh_writer import IDLE, MeshWriter, parse_mesh
from ovsmesh.controller.node_conditions import speaks_for
from ovsmesh.controller.node_writer import NodeWriter
from ovsmesh.controller.pod_cidr_allocator import Allocator
from ovsmesh.controller.slice_writer import SliceWriter
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.kube.client import Api, ApiError, Conflict, NotLeader, path_of
from ovsmesh.kube.events import EventRecorder
from ovsmesh.kube.leader_election import LeaderElector, Timing
from ovsmesh.kube.reflector import Reflector, Wakeup
from ovsmesh.mesh import meshslice
from ovsmesh.mesh.types import Node
from ovsmesh.names import DEFAULT_MESH, MESH_NODES, MESH_SLICES, MESHES
from ovsmesh.reasons import Reason

log = logging.getLogger("ovsmesh")

NAMESPACE = "ovsmesh"
LEASE = "ovsmesh-controller"
NODES = "/api/v1/nodes"
_NODE_WORK = 0.03
"""Seconds that a turn may spend on Nodes' conditions before slices are looked at again."""
_REST = 2.0
"""A look at all rests for so many times what it took: it takes a third of a core at most."""
_CATCH_UP = 5.0
"""Seconds that a new leader gives its watch of Nodes to come as far as a list; then it is begun anew."""
_WIDENED = 0.2
"""Seconds until Nodes are looked at again after the Mesh was changed for them; a bell comes sooner."""
_FEW = 2
_REFUSED = 5.0
"""Seconds until a slice that the API server has refused is written again."""


class _Seen:
    """What a turn looks at; compared by identity, as a look is replaced whenever something changed."""

    def __init__(self, controller: Controller) -> None:
        self.mesh = controller.meshes.collection().items.get(DEFAULT_MESH)
        self.nodes = controller.nodes.collection().items
        self.slices = controller.slices.collection().items
        self.reports = controller.reports.collection().items
        self.parts = tuple(map(id, (self.mesh, self.nodes, self.slices, self.reports)))
        """What it is compared by: as long as it is kept, nothing else can have these ids."""


class Controller:
    """`run` until the file descriptor is readable. `identity` must be this process's alone."""

    def __init__(
        self, api: Api, identity: str, health: ControllerHttp | None = None, times: Timing | None = None
    ) -> None:
        self.bell = Wakeup()
        self._api, self._health = api, health
        self.meshes = Reflector(api, MESHES, parse_mesh, self.bell, fields=f"metadata.name={DEFAULT_MESH}")
        self.nodes = self._node_reflector()
        self.slices = Reflector(api, MESH_SLICES, meshslice.parse_slice, self.bell)
        self.reports = Reflector(api, MESH_NODES, node_conditions.parse_meshnode, self.bell)
        self.lease = LeaderElector(api, NAMESPACE, LEASE, identity, self._lease_changed, times)
        path = path_of("/apis/coordination.k8s.io/v1/namespaces", NAMESPACE, "leases", LEASE)
        fenced = api.fenced(self.lease.remaining)
        self.events = EventRecorder(fenced, LEASE, identity)
        self._fenced = fenced
        self._slice_writer = SliceWriter(fenced, DEFAULT_MESH)
        self._node_writer = NodeWriter(fenced, self.events)
        self._allocator = Allocator(fenced, path, identity)
        self._pacer = slice_layout.Pacer()
        self._terms = self._term = 0
        """How many terms have begun, and in which we have taken over; 0 for none."""
        self._caught_up: tuple[Mapping[str, NodeView], Mapping[str, NodeView], float] | None = None
        self._mesh_writer = MeshWriter(fenced, self.events)
        self._collector = GarbageCollector(fenced)
        self._seen: _Seen | None = None
        self._again_at = float("inf")
        """When slices that are not as wanted yet are to be looked at again."""
        self._look_at = self._survey_at = self._allocate_at = self._retry_at = 0.0
        self._failures = 0
        self._basis: tuple[object, ...] = ()
        """What the membership and the slices were made from."""
        self._membership = Membership((), {})
        self._lacking: dict[str, Problem] = {}
        self._turns = self._errors = 0
        self._seconds = 0.0
        self._converged = 0

    def _node_reflector(self) -> Reflector[NodeView]:
        return Reflector(self._api, NODES, parse_node, self.bell)

    def _lease_changed(self, leads: bool) -> None:
        # in the lease's thread, before anything is written in the new term
        self._terms += leads
        self.bell.wake()

    def start(self) -> None:
        for one in (self.meshes, self.nodes, self.slices, self.reports, self.lease, self.events):
            one.start()

    def close(self) -> None:
        """Gives the lease back and ends all threads."""
        self.lease.close()
        for one in (self.events, self.meshes, self.nodes, self.slices, self.reports):
            one.close()
        self.bell.close()

    def run(self, stop: int) -> None:
        self.start()
        poll = select.poll()
        for fd in (stop, self.bell.fd):
            poll.register(fd, select.POLLIN)
        pause = 0.0
        while True:
            ready = [fd for fd, _ in poll.poll(pause * 1000)]
            if stop in ready:
                return
            self.bell.clear()
            began = time.monotonic()
            pause = self.turn()
            self._turns += 1
            self._seconds += time.monotonic() - began
            self._publish()

    # ------------------------------------------------------------ a turn

    def turn(self) -> float:
        """Does what is due; returns the seconds after which it wants to be called again, bells apart."""
        if not self.lease.is_leader:
            return IDLE
        if self._waiting():
            return 1.0
        now = time.monotonic()
        if now < self._retry_at:
            return self._retry_at - now
        try:
            if self._term != self._terms and not self._take_over():
                return 0.05
            pause = self._lead()
        except NotLeader as error:
            log.info("%s", error)
            return 0.1
        except ApiError as error:
            return self._failed(error)
        self._failures = 0
        return pause

    def _failed(self, error: ApiError) -> float:
        self._failures += 1
        self._errors += 1
        wait = min(10.0, 0.1 * 2.0 ** min(self._failures, 7)) * random.uniform(0.5, 1.0)
        wait = max(wait, min(error.retry_after, 30.0))
        self._retry_at = time.monotonic() + wait
        # What was found out may not have been written: look at all again.
        self._seen = None
        log.warning("%s; again in %.1f s", error, wait)
        return wait

    def _waiting(self) -> str:
        """What has not been read whole yet."""
        looks = {
            "Meshes": self.meshes.collection().synced,
            "Nodes": self.nodes.collection().synced,
            "MeshSlices": self.slices.collection().synced,
            "MeshNodes": self.reports.collection().synced,
        }
        return ", ".join(name for name, synced in looks.items() if not synced)

    def _take_over(self) -> bool:
        """The first turns of a term: nothing is written until our copy of the Nodes is as new as a list of now.

        The one who led before may have seen more than our watch, if that hangs.
        """
        have = self.nodes.collection().items
        now = time.monotonic()
        if self._caught_up is None:
            fresh: dict[str, NodeView] = {}
            for page in self._api.pages(NODES, 250):
                for item in page.items:
                    node = parse_node(item)
                    fresh[node.name] = node
            self._allocator.begin()
            self._caught_up = (fresh, have, now)
        wanted, then, since = self._caught_up
        if any(have.get(n) != wanted.get(n) and have.get(n) == then.get(n) for n in wanted.keys() | then.keys()):
            if now - since > _CATCH_UP:
                log.warning("the watch of Nodes is behind: begun anew")
                self.nodes.close(0.1)
                self.nodes = self._node_reflector()
                self.nodes.start()
                self._caught_up = None
            return False
        self._caught_up = None
        self._slice_writer.forget()
        self._node_writer.forget()
        self._mesh_writer.forget()
        self._seen, self._term = None, self._terms
        log.info("leading: %d Nodes", len(have))
        return True

    def _lead(self) -> float:
        now = time.monotonic()
        seen = _Seen(self)
        if seen.mesh is None:
            used = any(one.mesh == DEFAULT_MESH and one.nodes for one in self._slice_writer.now(seen.slices).values())
            return self._mesh_writer.make(seen.nodes.values(), used, now)
        pauses = [IDLE]
        if seen.parts != (self._seen.parts if self._seen else ()) or now >= min(self._again_at, self._survey_at):
            if now < self._look_at:
                pauses.append(self._look_at - now)
            else:
                self._look(seen, now)
        if now >= self._allocate_at:
            pauses.append(self._allocate(seen, now))
        # in a burst the slices go first
        if self._node_writer.work(_NODE_WORK if self._again_at == float("inf") else _NODE_WORK / 6):
            pauses.append(0.0)
        now = time.monotonic()
        if self._seen is not None:
            pauses.append(self._mesh_writer.tell(seen.mesh, self._membership, self._converged, now))
            if seen.nodes:  # an empty list never means that everyone has left
                pauses.append(self._collector.turn(seen.reports, seen.nodes, self._membership.static, now))
        pauses += [self._again_at - now, self._survey_at - now]
        return max(0.0, min(pauses))

    def _look(self, seen: _Seen, now: float) -> None:
        """Who is a member now; writes the slices, and finds what Nodes should say."""
        assert seen.mesh is not None
        if self._mesh_writer.widen(seen.mesh, seen.nodes.values(), now):
            # the watch brings it back within moments; until then the new Nodes would be refused
            self._survey_at = self._again_at = now + _WIDENED
            return
        there = self._slice_writer.now(seen.slices)
        # Of a Node only the first fields count here: the rest are the echoes of our own writes.
        basis = (seen.mesh, {name: node[:MEMBERSHIP_FIELDS] for name, node in seen.nodes.items()}, self._lacking, there)
        if self._seen is None or now >= self._again_at or basis != self._basis:
            self._members(seen, there, now)
            self._basis = (*basis[:3], self._slice_writer.now(seen.slices))
            self._mesh_writer.warn(seen.mesh, self._membership.static_problems)
        self._converged = self._count(seen)
        self._survey_at = now + self._node_writer.survey(seen.nodes, self._membership, seen.reports)
        self._seen = seen
        # Echoes of our own writes must not keep the loop busy.
        self._look_at = time.monotonic() + _REST * (time.monotonic() - now)

    def _members(self, seen: _Seen, there: Mapping[str, meshslice.MeshSlice], now: float) -> None:
        assert seen.mesh is not None
        self._mesh_writer.take(seen.mesh)
        slices = [one for one in there.values() if one.mesh == DEFAULT_MESH]
        held = [node for one in slices for node in one.nodes if isinstance(node, Node)]
        self._again_at = float("inf")
        mesh = self._mesh_writer.mesh
        if mesh is None or self._vanished(seen.nodes, held):
            return
        found = membership_of(mesh, seen.nodes.values(), held)
        self._membership = Membership(
            found.members, {**found.problems, **self._lacks(found)}, found.static_problems, found.static
        )
        due = self._pacer.due(now)
        writer = self._slice_writer
        made, whole = writer.write(found.members, mesh.settings, seen.mesh.generation, seen.slices, due <= now)
        if made:
            self._pacer.wrote(now, _differences(found.members, held))
            log.info("%d members, %d refused: %d slices written", len(found.members), len(found.problems), made)
        if not whole:
            self._again_at = max(due, now + (_REFUSED if writer.refused else 0.02))

    def _lacks(self, found: Membership) -> dict[str, Problem]:
        """What the allocator says of those that have no pod CIDRs still."""
        return {
            name: problem
            for name, problem in self._lacking.items()
            if name in found.problems and found.problems[name].reason == Reason.PodCIDRMissing
        }

    def _vanished(self, nodes: Mapping[str, NodeView], held: list[Node]) -> bool:
        """No Node at all where slices hold some: an empty list never means that everyone has left."""
        before = sum(bool(entry.uid) for entry in held)
        if nodes or before <= _FEW:
            return False
        message = f"the API has no Node any more, while {before} are in the mesh: slices are left as they are"
        self._membership = Membership(
            tuple(sorted(held, key=lambda node: node.name)),
            {},
            (Problem(Reason.NodesVanished, message),),
            frozenset(e.name for e in held if not e.uid),
        )
        return True

    def _count(self, seen: _Seen) -> int:
        found = 0
        for entry in self._membership.members:
            report, node = seen.reports.get(entry.name), seen.nodes.get(entry.name)
            own = entry.name in self._membership.static or (node is not None and speaks_for(report, node))
            found += own and report is not None and report.converged is not None and report.converged.status == "True"
        return found

    # ------------------------------------------------------------ beside the slices

    def _allocate(self, seen: _Seen, now: float) -> float:
        """Gives pod CIDRs to Nodes that lack them, where the Mesh asks for it."""
        mesh = self._mesh_writer.mesh
        if seen.mesh is None or mesh is None or not seen.mesh.allocates:
            self._lacking = {}
            return IDLE
        if all(node.pod_cidrs or node.excluded for node in seen.nodes.values()):
            self._lacking = {}
            return IDLE
        others = [*self._membership.members, *mesh.nodes]
        others += [node for one in seen.slices.values() for node in one.nodes if isinstance(node, Node)]
        asked = seen.mesh.subnet_length
        before = self._lacking
        try:
            self._lacking, more = self._allocator.turn(
                seen.nodes, mesh.cluster_cidrs, asked, [c for node in others for c in node.pod_cidrs], now
            )
        except Conflict as error:
            log.info("lease: %s", error)
            return 0.1
        if before != self._lacking:
            self._seen = None
            return 0.0
        self._allocate_at = now if more else now + 0.05
        return 0.0 if more else 1.0

    def _publish(self) -> None:
        if self._health is None:
            return
        waiting = self._waiting()
        counts = Counts(
            synced=not waiting,
            leads=self.lease.is_leader,
            nodes=len(self._membership.members),
            converged=self._converged,
            refused=len(self._membership.problems) + len(self._membership.static_problems),
            slices=len(self.slices.collection().items),
            turns=self._turns,
            slice_writes=self._slice_writer.writes,
            node_writes=self._node_writer.writes,
            errors=self._errors + self._slice_writer.conflicts + self._node_writer.errors,
            seconds=self._seconds,
            waiting=waiting,
        )
        self._health.report(counts)


def _differences(now: Iterable[Node], before: Iterable[Node]) -> int:
    """Return how many members came, changed or left."""
    old = {node.name: node for node in before}
    return sum(old.pop(node.name, None) != node for node in now) + len(old)


def identity() -> str:
    """Who we are in the Lease: no other process has it, and neither has our next."""
    return f"{socket.gethostname()}_{os.getpid()}_{os.urandom(4).hex()}"


def serve(api: Api, listen: str, stop: int) -> None:
    """Runs the controller until `stop` is readable. Raises OvsmeshError where it can't listen."""
    health = ControllerHttp(listen) if listen else None
    controller = Controller(api, identity(), health)
    try:
        controller.run(stop)
    except OvsmeshError as error:
        log.error("%s", error)
        raise
    finally:
        controller.close()
        if health is not None:
            health.close()
