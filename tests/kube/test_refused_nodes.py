"""Nodes that can't be joined, among real agents on real Open vSwitch: each is named, and all others are one mesh."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from tests.support.clusterlab import ClusterLab
from tests.support.controlplane import ControlPlane
from tests.support.kubekit import eventually

pytestmark = [pytest.mark.lab, pytest.mark.kube]


@pytest.fixture
def three(lab: Callable[..., Lab], own_plane: Callable[..., ControlPlane]) -> Iterator[ClusterLab]:
    made = lab(3, 1, agents=False, dual_stack=True)
    with ClusterLab(made, own_plane(address="192.0.2.1", ns=made.hub)) as cluster:
        yield cluster
        print(cluster.logs())


def add(cluster: ClusterLab, name: str, address: str, *cidrs: str) -> None:
    """A Node that no host stands behind."""
    spec: dict[str, Any] = {"podCIDR": cidrs[0], "podCIDRs": list(cidrs)} if cidrs else {}
    status = {"addresses": [{"type": "InternalIP", "address": address}]} if address else {}
    body = {"kind": "Node", "metadata": {"name": name}, "spec": spec, "status": status}
    answer = cluster.plane.call("POST", "/api/v1/nodes", body)
    assert answer.status == 201, answer


def routes(host: Host) -> dict[str, str]:
    """Destination → gateway of our routes, of both IP versions."""
    found = {}
    for version in ("-4", "-6"):
        for line in host.run(["ip", version, "route", "show", "proto", "111", "dev", "kbr0"]).stdout.splitlines():
            words = line.split()
            found[words[0]] = words[words.index("via") + 1] if "via" in words else ""
    return found


def said(cluster: ClusterLab, name: str) -> dict[str, str]:
    """What the Node's conditions and the Events about it say: "NetworkUnavailable", "MeshReady" and "Events"."""
    conditions = cluster.plane.call("GET", f"/api/v1/nodes/{name}").body["status"]["conditions"]
    texts = {c["type"].rpartition("/")[2]: f"{c['status']} {c['reason']} {c['message']}" for c in conditions}
    events = cluster.plane.call("GET", "/api/v1/namespaces/default/events").body["items"]
    about = [e for e in events if e["involvedObject"]["name"] == name]
    return texts | {"Events": " ".join(f"{e['reason']} {e['message']}" for e in about)}


def test_each_is_named_and_the_rest_converge(three: ClusterLab) -> None:
    hosts = three.lab.hosts
    ranges = [str(host.pod_cidrs[0]) for host in hosts]
    three.mesh(clusterCIDRs=["10.97.0.0/16", "fd00:97::/32"])
    for host in hosts:
        three.add_node(host)
    time.sleep(1.1)  # who is older is told by seconds
    add(three, "missing", "198.51.100.1")
    add(three, "duplicate", "198.51.100.2", ranges[0])
    add(three, "overlap", "198.51.100.3", ranges[1].replace(".0/24", ".128/25"))
    add(three, "outside", "198.51.100.4", "10.98.4.0/24")
    add(three, "elsewhere", "", "10.97.205.0/24")
    add(three, "address", str(hosts[2].address), "10.97.206.0/24")
    add(three, "v6only", "198.51.100.7", "fd00:97:77::/64")
    add(three, "dual", "198.51.100.8", "10.97.208.0/24", "fd00:97:88::/64")
    three.start_controller()
    for host in hosts:
        three.start_agent(host)
    # The two other hosts, v6only and dual.
    eventually(lambda: three.converged() == {host.name: 4 for host in hosts})
    three.plug()
    assert not [track for track in three.lab.ping_matrix() if track.lost]
    for number, host in enumerate(hosts):
        peers = {cidr for other, cidr in enumerate(ranges) if other != number}
        found = routes(host)
        assert set(found) >= peers | {"10.97.208.0/24", "fd00:97:77::/64", "fd00:97:88::/64"}
        assert not {"10.98.4.0/24", "10.97.205.0/24", "10.97.206.0/24"} & set(found)

    why = {
        "missing": ("PodCIDRMissing", "--allocate-node-cidrs"),
        "duplicate": ("PodCIDRConflict", f"{ranges[0]}: is the range of node {hosts[0].name}"),
        "overlap": ("PodCIDRConflict", f"overlaps {ranges[1]} of node {hosts[1].name}"),
        "outside": ("PodCIDROutside", "10.98.4.0/24"),
        "elsewhere": ("AddressMissing", "InternalIP"),
        "address": ("AddressConflict", f"is the address of node {hosts[2].name}"),
    }

    def named(name: str, reason: str, text: str) -> bool:
        found = said(three, name)
        good = {"NetworkUnavailable": "True", "MeshReady": "False", "Events": ""}
        return all(
            found.get(key, "").startswith(f"{status} {reason}".strip()) and text in found[key]
            for key, status in good.items()
        )

    for name, (reason, text) in why.items():
        eventually(lambda name=name, reason=reason, text=text: named(name, reason, text))  # type: ignore[misc]
    for host in hosts:
        eventually(lambda host=host: said(three, host.name)["MeshReady"].startswith("True"))  # type: ignore[misc]
        assert three.converged()[host.name] == 4

    # The rightful holder leaves: the one that waited takes its place on the others, through its own tunnel.
    before = routes(hosts[1])[ranges[0]]
    three.end(hosts[0].name)
    three.remove_node(hosts[0])
    ports = ["ovs-vsctl", f"--db={hosts[1].ovsdb}", "--bare", "--columns=options", "find", "Interface", "type=gre"]
    eventually(lambda: "198.51.100.2" in hosts[1].run(ports).stdout)
    assert routes(hosts[1])[ranges[0]] == before  # the same gateway, behind another tunnel
    assert str(hosts[0].address) not in hosts[1].run(ports).stdout.replace(",", " ").split()
