"""The controller: one loop that reads whole copies of the API's objects and writes what differs from the wanted.

Level-triggered: an event only makes the loop run sooner. It writes while it holds the Lease, slices first, and
never from a copy that is not whole. What is wanted is decided elsewhere: membership, slice_layout, node_conditions.
"""

from __future__ import annotations

import logging
import os
import random
import select
import socket
import time
from collections.abc import Iterable, Mapping

from ovsmesh import __version__
from ovsmesh.controller.api_cache import ApiCache, Observed
from ovsmesh.controller.garbage_collector import GarbageCollector
from ovsmesh.controller.http import ControllerHttp, Counts
from ovsmesh.controller.membership import MEMBERSHIP_FIELDS, Membership, membership_of
from ovsmesh.controller.mesh_writer import IDLE, MeshWriter
from ovsmesh.controller.node_conditions import count_converged
from ovsmesh.controller.node_writer import NodeWriter
from ovsmesh.controller.pod_cidr_allocator import PodCidrAllocator
from ovsmesh.controller.slice_layout import Pacer
from ovsmesh.controller.slice_writer import SliceWriter
from ovsmesh.errors import Problem
from ovsmesh.kube.client import Api, ApiError, Conflict, NotLeader, path_of
from ovsmesh.kube.events import EventRecorder
from ovsmesh.kube.leader_election import LeaderElector, Timing
from ovsmesh.mesh.meshslice import MeshSlice
from ovsmesh.mesh.types import Node
from ovsmesh.names import DEFAULT_MESH
from ovsmesh.reasons import Reason
from ovsmesh.text import counted
from ovsmesh.wakeup import Wakeup

log = logging.getLogger("ovsmesh")

NAMESPACE = "ovsmesh"
LEASE = "ovsmesh-controller"
_NODE_WORK = 0.03
"""Seconds that one pass may spend on Nodes' conditions before slices are compared again."""
_REST = 2.0
"""Comparing all rests for this many times what it took, so it takes a third of a core at most."""
_WIDENED = 0.2
"""Seconds until Nodes are compared again after the Mesh was changed for them; an event comes sooner."""
_REFUSED = 5.0
"""Seconds until a slice that the API server has refused is written again."""
_NEVER = float("inf")


class Controller:
    """Call `run` with a file descriptor that ends it. `identity` must be this process's alone."""

    def __init__(
        self, api: Api, identity: str, http: ControllerHttp | None = None, timing: Timing | None = None
    ) -> None:
        self.lease = LeaderElector(api, NAMESPACE, LEASE, identity, self._lease_changed, timing)
        self._wakeup, self._http = Wakeup(), http
        self._cache = ApiCache(api, self._wakeup)
        fenced = api.fenced(self.lease.remaining)
        self._events = EventRecorder(fenced, LEASE, identity)
        self._mesh_writer = MeshWriter(fenced, self._events)
        self._slice_writer = SliceWriter(fenced, DEFAULT_MESH)
        self._node_writer = NodeWriter(fenced, self._events)
        path = path_of("/apis/coordination.k8s.io/v1/namespaces", NAMESPACE, "leases", LEASE)
        self._allocator = PodCidrAllocator(fenced, path, identity)
        self._collector = GarbageCollector(fenced)
        self._pacer = Pacer()
        self._terms = self._term = 0
        """How many terms as leader have begun, and which of them was taken over; 0 for none."""
        self._seen: Observed | None = None
        """What was compared last; None if all must be compared again."""
        self._basis: tuple[object, ...] = ()
        """What the membership was decided from."""
        self._membership = Membership((), {})
        self._unallocated: Mapping[str, Problem] = {}
        """Nodes that get no pod CIDRs, and why."""
        self._converged = 0
        self._retry_at = self._compare_at = self._nodes_at = self._allocate_at = 0.0
        """Times (monotonic) before which nothing is tried, or that part of the work is not due."""
        self._slices_at = _NEVER
        """When slices that are not as wanted yet are due."""
        self._failures = self._errors = self._passes = 0
        self._seconds = 0.0

    def _lease_changed(self, leads: bool) -> None:
        # Called in the lease's thread, before anything is written in the new term.
        self._terms += leads
        self._wakeup.wake()

    def close(self) -> None:
        """Release the lease and end all threads."""
        self.lease.close()
        self._events.close()
        self._cache.close()
        self._wakeup.close()

    def run(self, stop: int) -> None:
        """Reconcile until `stop` is readable."""
        self._cache.start()
        self.lease.start()
        self._events.start()
        poll = select.poll()
        for fd in (stop, self._wakeup.fd):
            poll.register(fd, select.POLLIN)
        pause = 0.0
        while stop not in [fd for fd, _ in poll.poll(pause * 1000)]:
            self._wakeup.clear()
            began = time.monotonic()
            pause = self._reconcile()
            self._passes += 1
            self._seconds += time.monotonic() - began
            self._publish()

    def _publish(self) -> None:
        if self._http is None:
            return
        membership, reach = self._membership, self._node_writer.reachability
        counts = Counts(
            waiting=self._cache.waiting(),
            leads=self.lease.is_leader,
            nodes=len(membership.members),
            converged=self._converged,
            refused=len(membership.problems) + len(membership.static_problems),
            isolated=reach.isolated,
            bad_pairs=reach.bad_pairs,
            split=reach.split,
            slices=len(self._cache.observed().slices),
            turns=self._passes,
            slice_writes=self._slice_writer.writes,
            node_writes=self._node_writer.writes,
            errors=self._errors + self._slice_writer.conflicts + self._node_writer.errors,
            seconds=self._seconds,
        )
        self._http.report(counts)

    # ------------------------------------------------------------ one pass

    def _reconcile(self) -> float:
        """Do what is due. Return the seconds after which the next pass is due without an event."""
        if not self.lease.is_leader:
            return IDLE
        if self._cache.waiting():
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
        self._seen = None  # what was decided may not have been written
        log.warning("%s; the next attempt is in %.1f s", error, wait)
        return wait

    def _take_over(self) -> bool:
        """Begin a term. Return False while the copies are older than the term: nothing is written until then."""
        term = self._terms
        if not self._cache.caught_up(term):
            return False
        self._allocator.begin()
        for writer in (self._mesh_writer, self._slice_writer, self._node_writer):
            writer.forget()
        self._seen, self._term = None, term
        log.info("this replica leads; it sees %s", counted(len(self._cache.observed().nodes), "Node"))
        return True

    def _lead(self) -> float:
        now = time.monotonic()
        seen = self._cache.observed()
        if seen.mesh is None:
            slices = self._slice_writer.current(seen.slices).values()
            used = any(one.mesh == DEFAULT_MESH and one.nodes for one in slices)
            return self._mesh_writer.create(seen.nodes.values(), used, now)
        pauses = [IDLE]
        if not seen.is_same(self._seen) or now >= min(self._slices_at, self._nodes_at):
            if now < self._compare_at:
                pauses.append(self._compare_at - now)
            else:
                self._compare(seen, now)
        if now >= self._allocate_at:
            pauses.append(self._allocate(seen, now))
        # In a burst the slices go first.
        if self._node_writer.write(_NODE_WORK if self._slices_at == _NEVER else _NODE_WORK / 6):
            pauses.append(0.0)
        now = time.monotonic()
        if self._seen is not None:
            about = self._membership, self._converged, self._node_writer.reachability.problems
            pauses.append(self._mesh_writer.write_status(seen.mesh, *about, now))
            if seen.nodes:  # an empty list never means that everyone has left
                pauses.append(self._collector.collect(seen.reports, seen.nodes, self._membership.static, now))
        pauses += [self._slices_at - now, self._nodes_at - now]
        return max(0.0, min(pauses))

    def _compare(self, seen: Observed, now: float) -> None:
        """Decide who is a member, write the slices, and find what Nodes should say."""
        assert seen.mesh is not None
        if self._mesh_writer.widen(seen.mesh, seen.nodes.values(), now):
            # The watch brings the Mesh back within moments; until then the new Nodes would be refused.
            self._nodes_at = self._slices_at = now + _WIDENED
            return
        slices = self._slice_writer.current(seen.slices)
        # The other fields of a Node are notifications of our own writes.
        nodes = {name: node[:MEMBERSHIP_FIELDS] for name, node in seen.nodes.items()}
        if self._seen is None or now >= self._slices_at or (seen.mesh, nodes, self._unallocated, slices) != self._basis:
            self._write_slices(seen, slices, now)
            self._basis = (seen.mesh, nodes, self._unallocated, self._slice_writer.current(seen.slices))
        self._converged = count_converged(self._membership, seen.nodes, seen.reports)
        self._nodes_at = now + self._node_writer.compare(seen.nodes, self._membership, seen.reports)
        found = self._node_writer.reachability.problems
        split = [problem for problem in found if problem.reason is Reason.MeshSplit]
        self._mesh_writer.report(seen.mesh, (*self._membership.static_problems, *split))
        self._seen = seen
        # Notifications of our own writes must not keep the loop busy.
        self._compare_at = time.monotonic() + _REST * (time.monotonic() - now)

    def _write_slices(self, seen: Observed, slices: Mapping[str, MeshSlice], now: float) -> None:
        assert seen.mesh is not None
        self._slices_at = _NEVER
        mesh = self._mesh_writer.accept(seen.mesh)
        if mesh is None:
            return
        held = [node for one in slices.values() if one.mesh == DEFAULT_MESH for node in one.members]
        found = self._membership = membership_of(mesh, seen.nodes.values(), held, self._unallocated)
        due = self._pacer.due()
        generation = seen.mesh.generation
        made, whole = self._slice_writer.write(found.members, mesh.settings, generation, seen.slices, due <= now)
        if made:
            self._pacer.wrote(now, _differences(found.members, held))
            members, refused = counted(len(found.members), "node"), len(found.problems)
            log.info("%s written: %s in the mesh, %d refused", counted(made, "slice"), members, refused)
        if not whole:
            self._slices_at = max(due, now + (_REFUSED if self._slice_writer.refused else 0.02))

    def _allocate(self, seen: Observed, now: float) -> float:
        """Give pod CIDRs to Nodes without them, if the Mesh asks for it. Return the seconds until the next time."""
        mesh = self._mesh_writer.mesh
        assert seen.mesh is not None
        before, pause = self._unallocated, IDLE
        self._unallocated = {}
        if mesh is not None and seen.mesh.allocates and not all(n.pod_cidrs or n.excluded for n in seen.nodes.values()):
            members = [*self._membership.members, *mesh.nodes]
            members += [node for one in seen.slices.values() for node in one.members]
            others = [*self._mesh_writer.services, *(cidr for node in members for cidr in node.pod_cidrs)]
            asked = seen.mesh.subnet_length
            try:
                self._unallocated, more = self._allocator.allocate(seen.nodes, mesh.cluster_cidrs, asked, others, now)
            except Conflict as error:
                log.info("podCIDRs are not given this time: %s", error)
                self._unallocated = before
                return 0.1
            self._allocate_at, pause = (now, 0.0) if more else (now + 0.05, 1.0)
        if before != self._unallocated:
            self._seen, pause = None, 0.0
        return pause


def _differences(now: Iterable[Node], before: Iterable[Node]) -> int:
    """Return how many members came, changed or left."""
    old = {node.name: node for node in before}
    return sum(old.pop(node.name, None) != node for node in now) + len(old)


def identity() -> str:
    """Return a name for the Lease that no other process has, nor the next one here."""
    return f"{socket.gethostname()}_{os.getpid()}_{os.urandom(4).hex()}"


def serve(api: Api, listen: str, stop: int) -> None:
    """Run the controller until `stop` is readable. Raises OvsmeshError if it can't listen."""
    http = ControllerHttp(listen) if listen else None
    name = identity()
    controller = Controller(api, name, http)
    log.info("ovsmesh %s: the controller starts as %s", __version__, name)
    try:
        controller.run(stop)
        log.info("ovsmesh %s: the controller stops; the slices stay", __version__)
    finally:
        controller.close()
        if http is not None:
            http.close()
