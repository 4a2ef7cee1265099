"""Real controllers as processes, with their own service account, and what their tests write to the API.

Imports kube (as a quick client) of ovsmesh; the controller runs by its command line.
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ovsmesh.kube.client import MERGE, Api
from ovsmesh.kube.config import load
from tests.support.controlplane import ControlPlane, free_ports
from tests.support.kubekit import GROUP, eventually

NODES = "/api/v1/nodes"
LEASE = "/apis/coordination.k8s.io/v1/namespaces/ovsmesh/leases/ovsmesh-controller"
TAINT = "node.ovsmesh.io/agent-not-ready"
STRATEGIC = "application/strategic-merge-patch+json"
Object = dict[str, Any]


def mesh(*cidrs: str, **spec: Any) -> Object:
    spec = {"clusterCIDRs": list(cidrs or ("10.97.0.0/16", "fd00:97::/32")), **spec}
    return {"apiVersion": "ovsmesh.io/v1alpha1", "kind": "Mesh", "metadata": {"name": "default"}, "spec": spec}


def node(name: str, address: str = "", *cidrs: str, taint: bool = False, **meta: Any) -> Object:
    addresses = [{"type": "InternalIP", "address": address}] if address else []
    spec: Object = {"podCIDR": cidrs[0], "podCIDRs": list(cidrs)} if cidrs else {}
    if taint:
        other = {"key": "example.org/other", "effect": "NoSchedule"}
        spec["taints"] = [other, {"key": TAINT, "effect": "NoExecute"}]
    kubelet = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "ok"}
    status = {"addresses": addresses, "conditions": [kubelet]}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, **meta}, "spec": spec, "status": status}


def numbered(number: int) -> Object:
    """A good Node; up to 65,000 of them."""
    high, low = divmod(number, 250)
    return node(
        f"n{number:05d}", f"192.{high % 60 + 1}.{high // 60}.{low + 1}", f"10.{number >> 8}.{number & 255}.0/24"
    )


class Cluster:
    """The API as an administrator, and the controllers that run against it."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.api = Api(load(plane.kubeconfig()), timeout=20.0)
        self.running: list[Process] = []

    # ------------------------------------------------------------ objects

    def add(self, found: Object) -> Object:
        plural = {"Node": NODES, "Mesh": f"{GROUP}/meshes", "MeshNode": f"{GROUP}/meshnodes"}[found["kind"]]
        return self.api.create(plural, found)

    def remove(self, name: str) -> None:
        self.api.delete(f"{NODES}/{name}")

    def change(self, name: str, body: Object, kind: str = MERGE) -> Object:
        return self.api.patch(f"{NODES}/{name}", body, kind)

    def readdress(self, name: str, *addresses: str) -> None:
        status = {"status": {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]}}
        self.api.patch(f"{NODES}/{name}/status", status, MERGE)

    def report(
        self, name: str, converged: bool, reason: str = "Told", uid: str = "", lost: Sequence[str] = (), wanted: int = 2
    ) -> None:
        """What the node's agent would write, which loses all packets to the peers in `lost`."""
        path = f"{GROUP}/meshnodes"
        meta: Object = {"name": name}
        if uid:
            meta["ownerReferences"] = [{"apiVersion": "v1", "kind": "Node", "name": name, "uid": uid}]
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        condition = {"type": "Converged", "status": str(converged), "reason": reason, "message": f"because {reason}"}
        status = {
            "observedAt": stamp,
            "peers": {"wanted": wanted, "installed": wanted, "up": wanted - len(lost)},
            "reachability": {
                "reachable": f"{wanted - len(lost)}/{wanted}",
                "unreachable": len(lost),
                "unprobed": 0,
                "worstPeers": [
                    {"name": peer, "state": "unreachable", "cause": "nothing arrives from it"} for peer in lost
                ],
            },
            "mtu": 1462,
            "versions": {"agent": "0.1", "ovs": "3.1.0", "kernel": "6.1"},
            "conditions": [condition | {"lastTransitionTime": stamp}],
        }
        body = {"apiVersion": "ovsmesh.io/v1alpha1", "kind": "MeshNode", "metadata": meta}
        self.plane.call("POST", path, body)
        self.api.patch(f"{path}/{name}/status", {"status": status}, MERGE)

    def items(self, path: str) -> list[Object]:
        return [item for page in self.api.pages(path) for item in page.items]

    def node(self, name: str) -> Object:
        return self.api.get(f"{NODES}/{name}")

    def conditions(self, name: str) -> dict[str, tuple[str, str]]:
        """Type → (status, reason) of a Node."""
        return {c["type"]: (c["status"], c.get("reason", "")) for c in self.node(name)["status"]["conditions"]}

    def slices(self) -> list[Object]:
        return self.items(f"{GROUP}/meshslices")

    def members(self) -> dict[str, Object]:
        entries = [entry for one in self.slices() for entry in one["spec"].get("nodes", ())]
        names = {entry["name"]: entry for entry in entries}
        assert len(names) == len(entries), "a node stands in two places"
        return names

    def whole(self) -> bool:
        """Whether an agent would take the slices for complete."""
        found = {one["spec"]["index"]: one["spec"] for one in self.slices()}
        return bool(found) and found.keys() == set(range(max(spec["count"] for spec in found.values())))

    def slice_writes(self) -> int:
        """How many times slices were written since they were made."""
        return sum(one["metadata"]["generation"] for one in self.slices())

    def events(self, name: str) -> set[str]:
        """Reasons of the Events about an object."""
        found = self.items("/api/v1/namespaces/default/events")
        return {event["reason"] for event in found if event["involvedObject"]["name"] == name}

    def status(self) -> Object:
        status: Object = self.api.get(f"{GROUP}/meshes/default").get("status") or {}
        return status

    def leader(self) -> str:
        answer = self.plane.call("GET", LEASE)
        return str(answer.body.get("spec", {}).get("holderIdentity") or "")

    def until_members(self, *names: str, seconds: float = 60.0) -> None:
        eventually(lambda: sorted(self.members()) == sorted(names), seconds)

    # ------------------------------------------------------------ processes

    def controller(self) -> Process:
        name = f"controller{len(self.running)}"
        made = Process(self.plane, name)
        self.running.append(made)
        return made


class Process:
    """`python -m ovsmesh controller` with the token of the manifests' service account."""

    def __init__(self, plane: ControlPlane, name: str) -> None:
        self.plane = plane
        self.config = plane.token_kubeconfig(name, plane.token("ovsmesh-controller"))
        self.log = plane.folder / f"{name}.log"
        (self.port,) = free_ports(1)
        argv = [sys.executable, "-m", "ovsmesh", "controller", f"--kubeconfig={self.config}"]
        argv += [f"--listen=127.0.0.1:{self.port}", "--log-level=debug"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment())

    @property
    def pid(self) -> int:
        return self.process.pid

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5.0)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError as error:
            return 0, str(error)
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        _, text = self.get("/metrics")
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name} ")))

    def leads(self) -> bool:
        return self.get("/readyz") == (200, "ok, leading\n")

    def memory(self) -> float:
        """Resident memory in MiB."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(how)
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)
            return -1

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("KUBE", "OVSMESH"))}


@contextmanager
def cluster_of(plane: ControlPlane) -> Iterator[Cluster]:
    made = Cluster(plane)
    with ExitStack() as ending:
        ending.callback(made.api.close)
        ending.callback(lambda: [process.end() for process in made.running])
        yield made
    for process in made.running:
        text = process.log.read_text()
        assert "Traceback" not in text, text[-4000:]
