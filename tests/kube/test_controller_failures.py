"""Controllers that die, stall or lose the API: no slice is emptied, no pod CIDR given twice, all converges after."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from ipaddress import ip_network
from itertools import pairwise

import pytest

from tests.support.controllerkit import NODES, Cluster, mesh, node, numbered
from tests.support.controlplane import APISERVER, ETCD, ControlPlane
from tests.support.kubekit import GROUP, eventually

pytestmark = pytest.mark.kube


class Watcher:
    """Looks at the slices all the time, as agents do; `least` is how few members it has ever seen."""

    def __init__(self, kube: Cluster) -> None:
        self.kube, self.least, self.looks = kube, 10**9, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        from ovsmesh.kube.client import ApiError

        while not self._stop.wait(0.02):
            try:
                found = self.kube.slices()
            except ApiError:
                continue
            self.least = min(self.least, sum(len(one["spec"].get("nodes", ())) for one in found))
            self.looks += 1


def assert_no_overlap(kube: Cluster) -> None:
    found = [ip_network(cidr) for item in kube.items(NODES) for cidr in item["spec"].get("podCIDRs", ())]
    for version in (4, 6):
        ranges = sorted((n for n in found if n.version == version), key=lambda n: int(n.network_address))
        for a, b in pairwise(ranges):
            assert not a.overlaps(b), f"{a} and {b}"


def all_have(kube: Cluster) -> bool:
    return all(item["spec"].get("podCIDRs") for item in kube.items(NODES))


def test_the_leader_is_killed(kube: Cluster) -> None:
    """The next one goes on where it was; the slices never lose anyone meanwhile."""
    kube.add(mesh("10.0.0.0/8"))
    for number in range(120):
        kube.add(numbered(number))
    first = kube.controller()
    eventually(lambda: len(kube.members()) == 120)
    second = kube.controller()
    eventually(lambda: second.get("/readyz")[0] == 200)
    assert not second.leads()
    writes = kube.slice_writes()
    with Watcher(kube) as watcher:
        first.end(signal.SIGKILL)
        kube.add(numbered(120))
        eventually(lambda: len(kube.members()) == 121)
        time.sleep(0.5)
    assert second.leads()
    assert watcher.least >= 120 and watcher.looks > 50
    assert kube.slice_writes() == writes + 1


def test_a_leader_that_ends_hands_over_at_once(kube: Cluster) -> None:
    kube.add(mesh("10.0.0.0/8"))
    first = kube.controller()
    eventually(first.leads)
    second = kube.controller()
    eventually(lambda: second.get("/readyz")[0] == 200)
    held = kube.leader()
    assert held and first.end() == 0
    assert kube.leader() != held, "the lease was not released"
    kube.add(numbered(1))
    eventually(lambda: len(kube.members()) == 1)


def test_a_leader_that_stalls_writes_nothing_after_another_has_taken_over(kube: Cluster) -> None:
    """SIGSTOP in the midst of a burst, past the lease, then SIGCONT: what it believed is not written."""
    kube.add(mesh("10.0.0.0/8", allocatePodCIDRs=True, nodeSubnetLength=24))
    first = kube.controller()
    eventually(first.leads)
    second = kube.controller()
    eventually(lambda: second.get("/readyz")[0] == 200)
    for number in range(60):
        kube.add(node(f"n{number:03d}", f"192.0.2.{number + 1}"))
        if number == 30:
            first.pause()
    eventually(second.leads)
    eventually(lambda: len(kube.members()) == 60)
    before = {item["metadata"]["name"]: item["spec"]["podCIDRs"] for item in kube.items(NODES)}
    writes = kube.slice_writes()
    with Watcher(kube) as watcher:
        first.resume()
        time.sleep(3)
    assert second.leads() and not first.leads()
    assert kube.slice_writes() == writes and watcher.least == 60
    assert before == {item["metadata"]["name"]: item["spec"]["podCIDRs"] for item in kube.items(NODES)}
    assert_no_overlap(kube)


def test_pod_cidrs_are_never_given_twice_whoever_leads(kube: Cluster) -> None:
    """Nodes come all the time while leaders are killed one after the other; some bring pod CIDRs of their own."""
    kube.add(mesh("10.97.0.0/16", "fd00:97::/48", allocatePodCIDRs=True))
    stop = threading.Event()

    def come() -> None:
        for number in range(150):
            own = (
                (f"10.97.{200 + number // 10}.0/24", f"fd00:97:0:f{number // 10:03x}::/64") if number % 10 == 0 else ()
            )
            kube.add(node(f"n{number:03d}", f"192.0.2.{number + 1}", *own))
            if stop.wait(0.1):
                return

    coming = threading.Thread(target=come, daemon=True)
    processes = [kube.controller(), kube.controller()]
    eventually(lambda: any(p.leads() for p in processes))
    coming.start()
    try:
        for _ in range(2):
            time.sleep(1.5)
            leader = next(p for p in processes if p.leads())
            processes.remove(leader)
            leader.end(signal.SIGKILL)
            processes.append(kube.controller())
            eventually(lambda: any(p.leads() for p in processes))
        coming.join(60)
    finally:
        stop.set()
    eventually(lambda: len(kube.items(NODES)) == 150 and all_have(kube) and len(kube.members()) == 150)
    assert_no_overlap(kube)
    assert all(len(item["spec"]["podCIDRs"]) == 2 for item in kube.items(NODES))


def test_pod_cidrs_run_out(kube: Cluster) -> None:
    kube.add(mesh("10.97.0.0/30", allocatePodCIDRs=True, nodeSubnetLength=30))
    controller = kube.controller()
    eventually(controller.leads)
    kube.add(node("web1", "192.0.2.1"))
    kube.until_members("web1")
    kube.add(node("web2", "192.0.2.2"))
    eventually(lambda: kube.conditions("web2").get("ovsmesh.io/MeshReady") == ("False", "PodCIDRsExhausted"))
    eventually(lambda: "PodCIDRsExhausted" in kube.events("web2"))
    kube.remove("web1")
    kube.until_members("web2")


def _sigkill(plane: ControlPlane) -> None:
    plane.kill(APISERVER)
    time.sleep(20)
    plane.start(APISERVER)


def _etcd(plane: ControlPlane) -> None:
    plane.kill(ETCD)
    time.sleep(3)
    plane.start(ETCD)


def _stall(plane: ControlPlane) -> None:
    plane.pause(APISERVER)
    time.sleep(14)
    plane.resume(APISERVER)


@pytest.mark.parametrize("outage", [_sigkill, _etcd, _stall], ids=["api server down", "etcd restarted", "api stalls"])
def test_the_api_is_away_and_back(kube: Cluster, outage: Callable[[ControlPlane], None]) -> None:
    kube.add(mesh("10.0.0.0/8"))
    for number in range(20):
        kube.add(numbered(number))
    controller = kube.controller()
    eventually(lambda: len(kube.members()) == 20)
    writes = kube.slice_writes()
    with Watcher(kube) as watcher:
        outage(kube.plane)
        eventually(lambda: kube.plane.call("GET", f"{GROUP}/meshslices").status == 200)
        eventually(controller.leads)
        assert kube.slice_writes() == writes
        kube.add(numbered(20))
        eventually(lambda: len(kube.members()) == 21)
    assert watcher.least == 20
    assert controller.get("/healthz")[0] == 200
