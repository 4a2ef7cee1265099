"""What may happen to a control plane while pods send: each way, how many packets it cost, what the slices lost.

A Storm is three hosts that are converged, two controllers, and a stream between all pods of different hosts.
Each way ends when the control plane is as it was. Then a Node is made, and the mesh must follow.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ovsmesh.kube.client import Api
from ovsmesh.kube.config import load
from ovsmesh.kube.reflector import Reflector
from ovsmesh.lab import netns
from ovsmesh.lab.host import Host
from ovsmesh.lab.ping import Track
from ovsmesh.wakeup import Wakeup
from tests.support.clusterlab import ClusterLab
from tests.support.controlplane import APISERVER, ETCD
from tests.support.fault_proxy import Meddler
from tests.support.kubekit import GROUP, eventually

SLICES = f"{GROUP}/meshslices"
_INTERVAL = 0.006
_GRACE = 1.0
_LEASE = 15
"""Seconds of the lease; who stalls for longer has lost it."""
_SILENCE = 90
"""Seconds after which an agent takes a watch for stalled."""


@dataclass
class Outcome:
    """What one way did."""

    name: str
    sent: int
    lost: int
    silent: str
    """Which pairs lost some."""
    least: int
    """The fewest members that any version of the slices had."""
    back: float
    """Seconds from the end of it until a new Node is in the kernel of every host."""


class Storm:
    def __init__(self, cluster: ClusterLab, meddler: Meddler) -> None:
        self.cluster, self.meddler = cluster, meddler
        self.lab, self.plane = cluster.lab, cluster.plane
        self._members: list[int] = []
        self._numbers = itertools.count(1)
        self._controllers = itertools.count(1)
        self._names: list[str] = []

    def begin(self) -> None:
        """Makes the mesh converge, through the meddler; pods are plugged in."""
        hosts = self.lab.hosts
        self.cluster.mesh()
        for host in hosts:
            self.cluster.add_node(host)
        self.controller()
        self.controller()
        for host in hosts:
            self.cluster.start_agent(host, self.config(host))
        eventually(self.converged)
        self.cluster.plug()

    def converged(self) -> bool:
        return self.cluster.converged().keys() >= {host.name for host in self.lab.hosts}

    def config(self, host: Host) -> Path:
        return self.meddler.config(self.cluster.agent_config(host))

    def controller(self) -> None:
        self._names.append(self.cluster.start_controller(next(self._controllers)))

    # ------------------------------------------------------------ seeing

    def run(self, name: str, way: Callable[[], None]) -> Outcome:
        """The way under a stream; then a Node that joins and leaves. Fails where that is not followed."""
        with self._watched() as least:
            with self.lab.stream(None, _INTERVAL, _GRACE) as stream:
                time.sleep(0.3)
                way()
                time.sleep(0.7)
            back = self.join()
            found = min(self._members)
        assert least.collection().synced
        tracks: list[Track] = stream.tracks
        silent = [f"{t.pair.source} → {t.pair.target}: {t.lost} of {len(t.sent)}" for t in tracks if t.lost]
        sent, lost = sum(len(t.sent) for t in tracks), sum(t.lost for t in tracks)
        return Outcome(name, sent, lost, ", ".join(silent), found, back)

    @contextmanager
    def _watched(self) -> Iterator[Reflector[int]]:
        """Notes how many members each version of the slices has."""
        self._members = [len(self.lab.hosts)]
        with closing(Api(load(str(self.plane.kubeconfig())))) as api, closing(Wakeup()) as wakeup:
            watch: Reflector[int] = Reflector(api, SLICES, self._note, wakeup)
            with closing(watch):
                netns.within(self.plane.ns, watch.start)
                eventually(lambda: watch.collection().synced)
                yield watch

    def _note(self, found: dict[str, object]) -> int:
        spec = found["spec"]
        assert isinstance(spec, dict)
        self._members.append(len(spec.get("nodes", ())))
        return self._members[-1]

    def join(self) -> float:
        """Seconds until a new Node is everywhere; it goes again."""
        number = next(self._numbers)
        name, cidr = f"x{number}", f"10.97.{100 + number}.0/24"
        node = {"kind": "Node", "metadata": {"name": name}, "spec": {"podCIDR": cidr, "podCIDRs": [cidr]}}
        node["status"] = {"addresses": [{"type": "InternalIP", "address": f"198.51.100.{number}"}]}
        began = time.monotonic()
        eventually(lambda: self._call("POST", "/api/v1/nodes", node) in (201, 409))
        eventually(lambda: all(cidr in self.routes(host) for host in self.lab.hosts), _SILENCE + 30)
        took = time.monotonic() - began
        self._call("DELETE", f"/api/v1/nodes/{name}")
        eventually(lambda: not any(cidr in self.routes(host) for host in self.lab.hosts))
        eventually(self.converged)
        return took

    def _call(self, method: str, path: str, body: object = None) -> int:
        try:
            return self.plane.call(method, path, body).status
        except OSError:
            return 0

    @staticmethod
    def routes(host: Host) -> str:
        return host.run(["ip", "route", "show", "proto", "111", "dev", "kbr0"], check=False).stdout

    def leader(self, *but: str) -> str:
        """Name of the controller that leads, but for these; "" for none."""
        return next((name for name in self._names if name not in but and self._leads(name)), "")

    def _leads(self, name: str) -> bool:
        address = ("127.0.0.1", 9474 + int(name.removeprefix("controller")))
        try:
            with netns.within(self.plane.ns, lambda: socket.create_connection(address, 1)) as sock:
                sock.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
                return b"ok, leading" in b"".join(iter(lambda: sock.recv(4096), b""))
        except OSError:
            return False

    # ------------------------------------------------------------ ways

    def nothing(self, seconds: float) -> None:
        time.sleep(seconds)

    def api_down(self, seconds: float) -> None:
        """The API server dies; meanwhile an agent dies too, and starts from what it has on disk."""
        host = self.lab.hosts[0]
        config = self.plane.folder / f"meddled-agent-{host.name}.kubeconfig"
        self.plane.kill(APISERVER)
        end = time.monotonic() + seconds
        time.sleep(1)
        self.cluster.end(host.name, signal.SIGKILL)
        time.sleep(1)
        self.cluster.start_agent(host, config)
        eventually(host.ready)
        time.sleep(max(0.0, end - time.monotonic()))
        self.plane.start(APISERVER)

    def api_stalls(self, seconds: float) -> None:
        self.plane.pause(APISERVER)
        time.sleep(seconds)
        self.plane.resume(APISERVER)

    def etcd_restarted(self, seconds: float) -> None:
        self.plane.kill(ETCD)
        time.sleep(seconds)
        self.plane.start(ETCD)

    def kill_leader(self) -> None:
        eventually(self.leader)
        dead = self.leader()
        self.cluster.end(dead, signal.SIGKILL)
        self._names.remove(dead)

    def leader_killed(self) -> None:
        """Until the other leads; then there are two again."""
        self.kill_leader()
        eventually(self.leader)
        self.controller()

    def leader_stalls(self) -> None:
        """In the midst of a burst, until the other leads; then it goes on from where it was."""
        eventually(self.leader)
        stalled = self.leader()
        names = []
        for number in range(12):
            name, cidr = f"s{number}", f"10.97.{200 + number}.0/24"
            node = {"kind": "Node", "metadata": {"name": name}, "spec": {"podCIDR": cidr, "podCIDRs": [cidr]}}
            # without an address: it changes the controller's mind, not the switches
            names.append(name)
            assert self._call("POST", "/api/v1/nodes", node) == 201
            if number == 6:
                os.kill(self.cluster.pid(stalled), signal.SIGSTOP)
        try:
            eventually(lambda: self.leader(stalled), _LEASE * 4)
        finally:
            os.kill(self.cluster.pid(stalled), signal.SIGCONT)
        time.sleep(3)
        assert self.leader() != stalled
        for name in names:
            self._call("DELETE", f"/api/v1/nodes/{name}")

    def watch_fault(self, fault: str) -> None:
        assert self.meddler.do(fault) >= len(self.lab.hosts)

    def new_token(self, host: Host) -> None:
        """A new pod for the agent there, and so a new token; the old one is good for nothing."""
        path = f"/api/v1/namespaces/ovsmesh/pods/ovsmesh-agent-{host.name}?gracePeriodSeconds=0"
        assert self._call("DELETE", path) in (200, 404)
        self.plane.token_file(f"agent-{host.name}").write_text(self.plane.agent_token(host.name))

    def tokens_rotate(self) -> None:
        """Each agent's, and all connections end."""
        for host in self.lab.hosts:
            self.new_token(host)
        self.meddler.cut()


@contextmanager
def storm(cluster: ClusterLab) -> Iterator[Storm]:
    with ExitStack() as ending:
        made = Storm(cluster, ending.enter_context(Meddler(cluster.plane)))
        made.begin()
        yield made
