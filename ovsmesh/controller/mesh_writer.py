"""The Mesh object: read and checked as a mesh file is, created where there is none, its status and Events written.

Where there never was a Mesh, one is created with the cluster CIDRs that the Nodes' pod CIDRs come from. These are
widened as Nodes come, until someone edits them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ovsmesh.controller.ipam import derive, network
from ovsmesh.controller.membership import Membership, NodeView
from ovsmesh.controller.node_conditions import mesh_status
from ovsmesh.errors import Problem
from ovsmesh.kube.client import JSON, Api, ApiError, Conflict, Forbidden, Invalid, NotFound, Object, path_of
from ovsmesh.kube.events import EventRecorder, ObjectReference
from ovsmesh.mesh.manifest import parse_object
from ovsmesh.mesh.types import IPNetwork, Mesh, MeshError
from ovsmesh.names import API_VERSION, DEFAULT_MESH, GROUP, MESH, MESHES
from ovsmesh.reasons import Reason

log = logging.getLogger("ovsmesh")

DERIVED = f"{GROUP}/derived-cluster-cidrs"
"""Annotation on a Mesh: the clusterCIDRs that the controller wrote. It widens them as long as the two are equal."""
_PATIENCE = 10.0
"""Seconds without a Mesh before an Event says that none can be made: Nodes get their podCIDRs some time after them."""
_ECHO = 5.0
"""Seconds in which a write should come back through the watch."""
_PAUSE = 1.0
"""Seconds between two writes of the status."""
SERVICE_CIDRS = "/apis/networking.k8s.io/v1/servicecidrs"
"""Path of the ranges of ClusterIPs on an API server of Kubernetes 1.33 or newer."""
_SERVICES_AGE = 300.0
"""Seconds between two looks at them; they are hardly ever changed."""
IDLE = 30.0
"""Seconds until the next pass where nothing is due."""
_APPLY = (
    "Apply one, such as manifests/mesh.yaml: its clusterCIDRs are kube-controller-manager's --cluster-cidr; with"
    " allocatePodCIDRs ovsmesh gives the Nodes their podCIDRs itself"
)


@dataclass(frozen=True, slots=True)
class MeshView:
    """The Mesh object as it was read."""

    uid: str
    generation: int
    spec: dict[str, Any]
    status: dict[str, Any]
    derived: str = ""

    @property
    def widens(self) -> bool:
        """Whether its clusterCIDRs are still those that the controller derived."""
        return bool(self.derived) and self.derived == ",".join(map(str, self.spec.get("clusterCIDRs") or ()))

    @property
    def allocates(self) -> bool:
        """Whether the controller gives Nodes their pod CIDRs."""
        return self.spec.get("allocatePodCIDRs") is True

    @property
    def subnet_length(self) -> int | None:
        """Prefix length of a node's range, if the Mesh says one."""
        asked = self.spec.get("nodeSubnetLength")
        return asked if isinstance(asked, int) else None


def parse_mesh(found: Object) -> MeshView:
    """Return a Mesh object as a MeshView."""
    meta = found["metadata"]
    derived = (meta.get("annotations") or {}).get(DERIVED, "")
    spec, status = found.get("spec") or {}, found.get("status") or {}
    return MeshView(meta.get("uid", ""), meta.get("generation", 0), spec, status, derived)


class MeshWriter:
    """After accept(), `mesh` is the last good Mesh and `problems` say what is wrong with the object."""

    def __init__(self, api: Api, events: EventRecorder) -> None:
        self._api, self._events = api, events
        self.mesh: Mesh | None = None
        self.problems: tuple[Problem, ...] = ()
        self._spec: dict[str, Any] | None = None
        self._reported: set[str] = set()
        self._written: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        """The status that was there at the last write, and what was written."""
        self._status_at = 0.0
        self.services: tuple[IPNetwork, ...] = ()
        """The ranges of ClusterIPs, as far as the API tells: see _read_services."""
        self._services_at = 0.0
        self._missing_since = 0.0
        self._widened: tuple[MeshView | None, float] = (None, 0.0)
        """The object that was widened last, and until when its notification is awaited."""

    def forget(self) -> None:
        """Forget what was written and reported: another controller has led since."""
        self._reported, self._written = set(), ({}, {})

    def accept(self, view: MeshView) -> Mesh | None:
        """Read the object; return the last good Mesh."""
        if view.spec != self._spec:
            self._services_at = 0.0
            self._spec = view.spec
            found = {"apiVersion": API_VERSION, "kind": MESH, "spec": view.spec}
            try:
                self.mesh, self.problems = parse_object(found, f"Mesh {DEFAULT_MESH}")
            except MeshError as error:
                self.problems = (Problem(Reason.MeshInvalid, f"{error}; the slices stay as they are"),)
        self._read_services()
        return self.mesh

    def _read_services(self) -> None:
        """Read the ranges of ClusterIPs, where that is due.

        Kubernetes before 1.33 does not tell them. Then the API server's own address is all that is known: in a pod it
        is a ClusterIP.
        """
        now = time.monotonic()
        if now < self._services_at:
            return
        self._services_at = now + _SERVICES_AGE
        try:
            found = [item["spec"]["cidrs"] for page in self._api.pages(SERVICE_CIDRS) for item in page.items]
            texts = [text for cidrs in found for text in cidrs]
        except (NotFound, Forbidden):
            texts = [self._api.host]
        except (ApiError, KeyError, TypeError) as error:
            log.info("ServiceCIDRs not read: %s", error)
            return
        self.services = tuple(net for text in texts if isinstance(text, str) and (net := network(text)))

    def _covered(self) -> Iterator[Problem]:
        """Yield a problem for each cluster CIDR that holds ClusterIPs."""
        for cluster in self.mesh.cluster_cidrs if self.mesh else ():
            for services in self.services:
                if cluster.overlaps(services):
                    what = f"the ClusterIP {services.network_address}"
                    if services.num_addresses > 1:
                        what = f"the Service range {services}"
                    text = (
                        f"overlaps {what}: processes of the hosts may not reach Services, as the kernel looks for a "
                        "route before kube-proxy is asked; give the pods' range alone (kube-controller-manager's "
                        "--cluster-cidr)"
                    )
                    yield Problem(Reason.ServiceRangeCovered, text, field="clusterCIDRs", value=str(cluster))

    def create(self, nodes: Iterable[NodeView], used: bool, now: float) -> float:
        """Create the Mesh, unless slices of an earlier one are `used`. Return the seconds until the next attempt."""
        try:
            if used:
                raise MeshError("MeshSlices of one that is gone are in use and stay as they are")
            self._read_services()
            cidrs = derive(nodes, (), (self._api.host,), self.services)
        except MeshError as error:
            self._missing_since = self._missing_since or now
            if now - self._missing_since < _PATIENCE:
                return _PATIENCE
            message = f"there is no Mesh {DEFAULT_MESH}, and none is made: {error}. {_APPLY}"
            self._report((Problem(Reason.MeshMissing, message),), "")
            return IDLE
        self._missing_since = 0.0
        metadata = {"name": DEFAULT_MESH, "annotations": {DERIVED: ",".join(cidrs)}}
        body = {"apiVersion": API_VERSION, "kind": MESH, "metadata": metadata, "spec": {"clusterCIDRs": list(cidrs)}}
        try:
            uid = self._api.create(MESHES, body)["metadata"].get("uid", "")
        except Conflict:
            return _PAUSE  # someone else was faster; the watch brings it
        message = f"made with clusterCIDRs {', '.join(cidrs)}, from the Nodes' podCIDRs; edit it where that is wrong"
        log.info("Mesh %s: %s", DEFAULT_MESH, message)
        self._events.record(_reference(uid), Reason.MeshDerived, message, warning=False)
        return IDLE

    def widen(self, view: MeshView, nodes: Iterable[NodeView], now: float) -> bool:
        """Widen derived clusterCIDRs to hold the Nodes' pod CIDRs. Return whether `view` is out of date by that."""
        if not view.widens:
            return False
        if self._widened[0] is view:
            return now < self._widened[1]
        have = view.spec["clusterCIDRs"]
        try:
            cidrs = list(derive(nodes, have, (self._api.host,), self.services))
        except MeshError as error:
            # The Node that does not fit is refused, with a condition.
            log.debug("Mesh %s: clusterCIDRs stay as they are: %s", DEFAULT_MESH, error)
            return False
        if cidrs == have:
            return False
        annotation = f"/metadata/annotations/{DERIVED.replace('/', '~1')}"
        steps: list[Object] = [
            {"op": "test", "path": "/metadata/uid", "value": view.uid},
            {"op": "test", "path": "/spec/clusterCIDRs", "value": have},
            {"op": "test", "path": annotation, "value": view.derived},
            {"op": "replace", "path": "/spec/clusterCIDRs", "value": cidrs},
            {"op": "replace", "path": annotation, "value": ",".join(cidrs)},
        ]
        try:
            self._api.patch(path_of(MESHES, DEFAULT_MESH), steps, JSON)
        except (Conflict, Forbidden, Invalid, NotFound) as error:
            forbidden = isinstance(error, Forbidden)
            level = logging.WARNING if forbidden else logging.INFO
            log.log(level, "Mesh %s: clusterCIDRs not widened to %s: %s", DEFAULT_MESH, ", ".join(cidrs), error)
            self._widened = (view, 0.0 if forbidden else now + _ECHO)
            return not forbidden
        log.info("Mesh %s: clusterCIDRs widened to %s", DEFAULT_MESH, ", ".join(cidrs))
        self._widened = (view, now + _ECHO)
        return True

    def report(self, view: MeshView, problems: Iterable[Problem]) -> None:
        """Record Events about the Mesh itself, one for each text as long as it stays true."""
        self._report((*self.problems, *self._covered(), *problems), view.uid)

    def _report(self, problems: Iterable[Problem], uid: str) -> None:
        now = {str(problem): problem for problem in problems}
        for text, problem in now.items():
            if text not in self._reported:
                log.warning("%s", problem)
                self._events.record(_reference(uid), problem.reason, text)
        self._reported = set(now)

    def write_status(
        self, view: MeshView, membership: Membership, converged: int, more: Iterable[Problem], now: float
    ) -> float:
        """Write the status if it differs; `more` are problems between nodes. Return the seconds until the next try."""
        seen, written = self._written
        before = written if written and seen is view.status else view.status  # until the write is notified
        self._read_services()
        problems = (*self.problems, *self._covered(), *more)
        wanted = mesh_status(membership, converged, view.generation, problems, before, time.time())
        if wanted == before:
            return IDLE
        if now < self._status_at:
            return self._status_at - now
        self._status_at = now + _PAUSE
        try:
            self._api.patch(path_of(MESHES, DEFAULT_MESH, "status"), {"metadata": {"uid": view.uid}, "status": wanted})
        except (Conflict, NotFound) as error:
            log.info("Mesh %s: status not written: %s", DEFAULT_MESH, error)
            return _PAUSE
        self._written = (view.status, wanted)
        return IDLE


def _reference(uid: str) -> ObjectReference:
    return ObjectReference(API_VERSION, MESH, DEFAULT_MESH, uid)
