"""The quorum with ten real hosts: agents probe through Open vSwitch and write to a real API server, which a controller
reads. Faults are in the underlay. `python -m tests.kube.test_quorum_lab 5` prints how long marks take, of five tries.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ovsmesh.lab import netns, underlay
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from tests.support.clusterlab import ClusterLab
from tests.support.controlplane import ControlPlane
from tests.support.kubekit import GROUP, eventually

pytestmark = [pytest.mark.lab, pytest.mark.kube, pytest.mark.timeout(900)]

HOSTS = 10
READY, ISOLATED = ("True", "MeshConverged"), ("False", "Isolated")
_SECONDS = 120.0
"""Far more than anything takes: a busy machine delays packets too."""


def start(lab: Lab, plane: ControlPlane) -> ClusterLab:
    """Ten nodes, a controller and ten agents, of which each reaches all others."""
    cluster = ClusterLab(lab, plane)
    for host in lab.hosts:
        cluster.add_node(host)
    cluster.start_controller()
    for host in lab.hosts:
        cluster.start_agent(host)
    eventually(lambda: reachable(cluster) == {host.name: "9/9" for host in lab.hosts}, _SECONDS, 0.5)
    eventually(lambda: set(ready(cluster).values()) == {READY}, _SECONDS, 0.5)
    return cluster


@pytest.fixture(scope="module")
def ten(
    module_lab: Callable[..., Lab], programs: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ClusterLab]:
    made = module_lab(HOSTS, 1, agents=False)
    with ControlPlane(tmp_path_factory.mktemp("kube"), "192.0.2.1", made.hub) as plane, start(made, plane) as cluster:
        yield cluster
        print(cluster.logs())


def reachable(cluster: ClusterLab) -> dict[str, str]:
    """What `kubectl get meshnodes` shows below REACHABLE."""
    found = cluster.plane.call("GET", f"{GROUP}/meshnodes").body.get("items", ())
    return {
        item["metadata"]["name"]: item.get("status", {}).get("reachability", {}).get("reachable", "") for item in found
    }


def ready(cluster: ClusterLab) -> dict[str, tuple[str, str]]:
    """Node → status and reason of its condition MeshReady."""
    found = {}
    for node in cluster.plane.call("GET", "/api/v1/nodes").body["items"]:
        conditions = {c["type"]: c for c in node["status"].get("conditions", ())}
        about = conditions.get("ovsmesh.io/MeshReady", {})
        found[node["metadata"]["name"]] = about.get("status", ""), about.get("reason", "")
        unavailable = conditions.get("NetworkUnavailable", {}).get("status")
        assert unavailable == {"True": "False", "False": "True"}.get(about.get("status", ""), unavailable)
    return found


def becomes(cluster: ClusterLab, marked: str = "") -> float:
    """Wait until exactly this node is marked, "" for none; the seconds that took. No other node is marked meanwhile."""
    began = time.monotonic()
    while True:
        now = ready(cluster)
        others = {name: state for name, state in now.items() if name != marked and state != READY}
        if not others and now.get(marked, ISOLATED) == ISOLATED:
            return time.monotonic() - began
        assert not marked or not others, f"{others} beside {marked}"
        assert time.monotonic() - began < _SECONDS, now
        time.sleep(0.1)


def nothing_changes(cluster: ClusterLab, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert set(ready(cluster).values()) == {READY}
        time.sleep(0.2)


@contextmanager
def fault(cluster: ClusterLab, *matches: str) -> Iterator[None]:
    """Have the underlay drop these packets. The API server's are never among them."""
    hub = underlay.hub(cluster.lab.settings)
    chain = "type filter hook forward priority 0; policy accept;"
    rules = "; ".join(f"ip protocol gre {match} drop" for match in matches)
    netns.run(["nft", "-f", "-"], hub, text=f"table bridge fault {{ chain c {{ {chain} {rules}; }}; }}\n")
    try:
        yield
    finally:
        netns.run(["nft", "delete table bridge fault"], hub)


def around(host: Host) -> tuple[str, str]:
    return f"ip saddr {host.address}", f"ip daddr {host.address}"


def between(one: Host, other: Host) -> tuple[str, str]:
    return f"ip saddr {one.address} ip daddr {other.address}", f"ip saddr {other.address} ip daddr {one.address}"


def settled(cluster: ClusterLab) -> None:
    eventually(lambda: set(reachable(cluster).values()) == {"9/9"}, _SECONDS, 0.5)


def isolate(cluster: ClusterLab, host: Host) -> tuple[float, float]:
    """Cut a host off and join it again; the seconds until it is marked, and until it is cleared."""
    with fault(cluster, *around(host)):
        marked = becomes(cluster, host.name)
    return marked, becomes(cluster)


def events(cluster: ClusterLab, reason: str) -> Mapping[str, str]:
    found = cluster.plane.call("GET", "/api/v1/namespaces/default/events").body["items"]
    return {e["involvedObject"]["name"]: e["message"] for e in found if e["reason"] == reason}


def test_exactly_the_isolated_node_is_marked_and_cleared(ten: ClusterLab) -> None:
    marked, cleared = isolate(ten, ten.lab.host(4))
    print(f"marked after {marked:.1f} s, cleared after {cleared:.1f} s")
    assert "h4" in events(ten, "Isolated")
    settled(ten)


def test_a_node_whose_agent_is_dead_is_marked_and_cleared_all_the_same(ten: ClusterLab) -> None:
    host = ten.lab.host(5)
    ten.end(host.name)
    try:
        marked, cleared = isolate(ten, host)
        print(f"marked after {marked:.1f} s, cleared after {cleared:.1f} s")
    finally:
        ten.start_agent(host)
    settled(ten)


def test_one_bad_pair_marks_nobody_and_both_ends_get_an_event_with_the_cause(ten: ClusterLab) -> None:
    one, other = ten.lab.host(1), ten.lab.host(2)
    with fault(ten, *between(one, other)):
        eventually(lambda: {"h1", "h2"} <= events(ten, "PeersUnreachable").keys(), _SECONDS, 0.5)
        found = events(ten, "PeersUnreachable")
        assert "h2 unreachable" in found["h1"] and "GRE" in found["h1"]
        assert "h1 unreachable" in found["h2"] and str(one.address) in found["h2"]
        nothing_changes(ten, 20)
        assert reachable(ten)["h1"] == "8/9"
        columns = ten.plane.kubectl("get", "meshnodes", "h1").splitlines()
        assert "8/9" in columns[1] and "REACHABLE" in columns[0]
    eventually(lambda: {"h1", "h2"} <= events(ten, "PeersReachable").keys(), _SECONDS, 0.5)
    settled(ten)


def test_what_happens_while_the_controller_is_down_changes_nothing(ten: ClusterLab) -> None:
    ten.end("controller1")
    with fault(ten, *around(ten.lab.host(7))):
        eventually(lambda: reachable(ten)["h7"] == "0/9", _SECONDS, 0.5)
        nothing_changes(ten, 5)
    settled(ten)
    ten.start_controller()
    nothing_changes(ten, 15)


def main(tries: int) -> None:
    times: list[tuple[float, float]] = []
    with ExitStack() as ending:
        lab = Lab(HOSTS, 1, ephemeral=True, agents=False)
        ending.callback(lab.down)
        lab.up()
        folder = ending.enter_context(tempfile.TemporaryDirectory())
        plane = ending.enter_context(ControlPlane(Path(folder), "192.0.2.1", lab.hub))
        cluster = ending.enter_context(start(lab, plane))
        for number in range(tries):
            times.append(isolate(cluster, lab.host(number % HOSTS + 1)))
            print(f"marked after {times[-1][0]:.1f} s, cleared after {times[-1][1]:.1f} s", flush=True)
            settled(cluster)
    for what, found in zip(("marked", "cleared"), zip(*times, strict=True), strict=True):
        print(f"{what}: p50 {statistics.median(found):.1f} s, max {max(found):.1f} s of {tries}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
