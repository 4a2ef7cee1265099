"""Lab hosts with a real control plane and any number of Nodes, and an administrator's access to it.

Built on the harness of the tests (tests.support: clusterlab, controlplane), so what is measured is what is tested: real
TLS, the manifests' RBAC, tokens bound to a pod on the node.
"""

from __future__ import annotations

import http.client
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from benchlib.peers import Peer
from benchlib.testbed import Testbed
from ovsmesh.kube.client import Api
from ovsmesh.kube.config import load
from ovsmesh.kube.reflector import Reflector
from ovsmesh.lab import netns
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import LabError
from ovsmesh.wakeup import Wakeup
from tests.support.clusterlab import ClusterLab
from tests.support.controlplane import ControlPlane
from tests.support.kubekit import GROUP

NODES = "/api/v1/nodes"
SLICES = f"{GROUP}/meshslices"
STRATEGIC = "application/strategic-merge-patch+json"
CLUSTER = "10.0.0.0/8"
_FILLERS = 4
_PATIENCE = 20.0
Object = dict[str, Any]


def node(name: str, address: str, cidr: str) -> Object:
    """Return a Node of about 9 KB, as kubelets make them. Most of it is the list of images."""
    images = [{"names": [f"registry.example/{n:02d}/{'x' * 70}@sha256:{n:064d}"], "sizeBytes": n} for n in range(42)]
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "kubelet is posting ready status"}
    pressure = ("MemoryPressure", "DiskPressure", "PIDPressure")
    fine = [{"type": kind, "status": "False", "reason": "KubeletHasSufficient", "message": "ok"} for kind in pressure]
    stamp = {"lastHeartbeatTime": now, "lastTransitionTime": now}
    capacity = {"cpu": "8", "memory": "32Gi", "pods": "110", "ephemeral-storage": "100Gi"}
    status = {
        "addresses": [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": name}],
        "capacity": capacity,
        "allocatable": capacity,
        "conditions": [condition | stamp for condition in (ready, *fine)],
        "images": images,
    }
    labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    spec = {"podCIDR": cidr, "podCIDRs": [cidr]}
    return {"kind": "Node", "metadata": {"name": name, "labels": labels}, "spec": spec, "status": status}


class Admin:
    """The API as its administrator uses it, over one connection for each thread."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane, self._kept = plane, threading.local()
        plane.connection("admin", 30).close()  # one thread makes the certificate

    def ask(self, method: str, path: str, body: object = None, kind: str = "application/json") -> Object:
        """Send a request and return the answer. Raises LabError when it is refused, OSError when there is no answer."""
        data = None if body is None else json.dumps(body).encode()
        until = time.monotonic() + _PATIENCE
        while True:
            status, answer = self._once(method, path, data, kind)
            if status != 429 or time.monotonic() > until:
                break
            # its storage of a new kind is not ready yet, or it is overloaded
            time.sleep(1)
        if status >= 300:
            raise LabError(f"{method} {path}: {status} {answer[:300].decode(errors='replace')}")
        found: Object = json.loads(answer)
        return found

    def _once(self, method: str, path: str, data: bytes | None, kind: str) -> tuple[int, bytes]:
        for last in (False, True):
            connection = getattr(self._kept, "connection", None)
            if connection is None:
                connection = self._kept.connection = self._plane.connection("admin", 30)
                self._plane.connect(connection)
            try:
                connection.request(method, path, data, {"Content-Type": kind, "Accept": "application/json"})
                response = connection.getresponse()
                return response.status, response.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                self._kept.connection = None
                if last:
                    raise
        raise AssertionError("not reached")

    def add(self, peer: Peer) -> float:
        """Make the Node of a peer. Return when the request was sent (CLOCK_MONOTONIC)."""
        body = node(*peer)
        at = time.monotonic()
        self.ask("POST", NODES, body)
        return at

    def remove(self, peer: Peer) -> float:
        """Delete the Node of a peer. Return when the request was sent (CLOCK_MONOTONIC)."""
        at = time.monotonic()
        self.ask("DELETE", f"{NODES}/{peer.name}")
        return at

    def fill(self, peers: Sequence[Peer]) -> None:
        """Make the Nodes of all peers, a few at a time."""
        with ThreadPoolExecutor(_FILLERS) as pool:
            list(pool.map(self.add, peers))

    def slices(self) -> list[Object]:
        """Return all MeshSlices."""
        found: list[Object] = self.ask("GET", SLICES)["items"]
        return found

    def members(self) -> int:
        """Return how many nodes are in slices."""
        return sum(len(one["spec"].get("nodes", ())) for one in self.slices())

    def slice_writes(self) -> int:
        """Return how many times slices were written since each was made."""
        return sum(one["metadata"]["generation"] for one in self.slices())


class SliceWatch:
    """A watch of the slices. `seen` says when each member was first in a slice that the API server sent."""

    def __init__(self, plane: ControlPlane) -> None:
        self.seen: dict[str, float] = {}
        self._wakeup = Wakeup()
        self._api = Api(load(str(plane.kubeconfig())))
        self.watch = Reflector(self._api, SLICES, self._note, self._wakeup)
        # a thread that is started inside the namespace stays in it
        netns.within(plane.ns, self.watch.start)
        netns.wait_for("the slices to be listed", lambda: self.watch.collection().synced, 30)

    def _note(self, found: Object) -> int:
        now = time.monotonic()
        for entry in found["spec"].get("nodes", ()):
            self.seen.setdefault(entry["name"], now)
        return int(found["metadata"]["resourceVersion"])

    def close(self) -> None:
        """End the watch."""
        self.watch.close()
        self._api.close()
        self._wakeup.close()


class KubeTestbed(Testbed):
    """A Testbed whose mesh comes from Nodes. `peers` are those that the host should have."""

    def __init__(self, lab: Lab, cluster: ClusterLab) -> None:
        super().__init__(lab.hosts[0], lab)
        self.cluster, self.plane = cluster, cluster.plane
        self.admin = Admin(cluster.plane)

    def fill(self, peers: Sequence[Peer]) -> None:
        """Make Nodes of the host and of these peers. Return when the controller has them all in slices."""
        own = self.host.node
        self.admin.add(Peer(own["name"], own["address"], own["podCIDRs"][0]))
        self.admin.fill(peers)
        self.peers = list(peers)
        self.cluster.start_controller()
        self.until_members(len(peers) + 1)

    def until_members(self, count: int, timeout: float = 60.0) -> None:
        """Wait until `count` nodes are in slices."""
        netns.wait_for(f"{count} members in slices", lambda: self.admin.members() == count, timeout, every=0.05)

    def ready(self, timeout: float = 60.0) -> None:
        """Wait until the agent is ready."""
        try:
            super().ready(timeout)
        except LabError as error:
            raise LabError(f"{error}\n{self.cluster.logs(10)}") from error

    def reset(self) -> None:
        """End the agent and remove everything that it made and stored."""
        self.cluster.end(self.host.name)
        self.cluster.clean(self.host)

    def pid(self, name: str = "") -> int:
        """Return the pid of a process of the cluster, the agent unless named."""
        return self.cluster.pid(name or self.host.name)


@contextmanager
def cluster_lab(
    hosts: int, pods: int, make: Callable[..., ControlPlane] = ControlPlane, **mesh: Any
) -> Iterator[ClusterLab]:
    """Make a lab with a control plane on its underlay and the manifests applied; no Node, agent or controller yet."""
    with (
        tempfile.TemporaryDirectory(prefix="ovsmesh-bench-") as folder,
        Lab(hosts, pods, agents=False, ephemeral=True) as lab,
        make(Path(folder), address="192.0.2.1", ns=lab.hub) as plane,
        ClusterLab(lab, plane) as cluster,
    ):
        cluster.mesh(**mesh)
        yield cluster


@contextmanager
def kube_testbed(peers: Sequence[Peer]) -> Iterator[KubeTestbed]:
    """Make one host, the Nodes of these peers and a controller; no agent yet."""
    with cluster_lab(1, 0, clusterCIDRs=[CLUSTER]) as cluster:
        made = KubeTestbed(cluster.lab, cluster)
        made.fill(peers)
        yield made


@contextmanager
def slice_watch(plane: ControlPlane) -> Iterator[SliceWatch]:
    """Watch the slices while the context lasts."""
    with closing(SliceWatch(plane)) as made:
        yield made
