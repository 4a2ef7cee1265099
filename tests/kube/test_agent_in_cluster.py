"""The real agent with real Open vSwitch on MeshSlices from a real API server: start, join, an API that is away."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from tests.support.clusterlab import ClusterLab
from tests.support.controlplane import APISERVER, ControlPlane
from tests.support.kubekit import GROUP, eventually

pytestmark = [pytest.mark.lab, pytest.mark.kube]


@pytest.fixture
def two(lab: Callable[..., Lab], own_plane: Callable[..., ControlPlane]) -> Iterator[ClusterLab]:
    made = lab(2, 1, agents=False)
    with ClusterLab(made, own_plane(address="192.0.2.1", ns=made.hub)) as cluster:
        for host in made.hosts:
            cluster.add_node(host)
        yield cluster
        print(cluster.logs())


def write_slice(cluster: ClusterLab, *hosts: Host, extra: int = 0) -> None:
    """Write the slice that the controller would write for these hosts and for `extra` more that do not exist."""
    nodes = []
    for host in hosts:
        uid = cluster.plane.call("GET", f"/api/v1/nodes/{host.name}").body["metadata"]["uid"]
        cidrs = [str(cidr) for cidr in host.pod_cidrs]
        nodes.append({"name": host.name, "uid": uid, "address": str(host.address), "podCIDRs": cidrs})
    for n in range(extra):
        nodes.append({"name": f"x{n}", "address": f"198.51.100.{n + 1}", "podCIDRs": [f"10.97.{100 + n}.0/24"]})
    about = {"mesh": "default", "index": 0, "count": 1, "meshGeneration": 1}
    settings = {"clusterCIDRs": ["10.97.0.0/16"], "encapsulation": "gre", "mtu": "auto"}
    body = {
        "apiVersion": "ovsmesh.io/v1alpha1",
        "kind": "MeshSlice",
        "metadata": {"name": "default-000", "labels": {"ovsmesh.io/mesh": "default"}},
        "spec": {**about, "settings": settings, "nodes": nodes},
    }
    path = f"{GROUP}/meshslices/default-000?fieldManager=test&force=true"
    answer = cluster.plane.call("PATCH", path, body, content_type="application/apply-patch+yaml")
    assert answer.status in (200, 201), answer


def routes(host: Host) -> set[str]:
    lines = host.run(["ip", "route", "show", "proto", "111", "dev", "kbr0"], check=False).stdout.splitlines()
    return {line.split()[0] for line in lines if line.split()}


def took(what: Callable[[], object], seconds: float = 20.0) -> float:
    began = time.monotonic()
    eventually(what, seconds, 0.01)
    return time.monotonic() - began


def test_an_agent_follows_slices_and_starts_without_the_api(two: ClusterLab) -> None:
    one, other = two.lab.hosts
    write_slice(two, one, other)
    for host in (one, other):
        two.start_agent(host)
    eventually(lambda: two.converged() == {one.name: 1, other.name: 1})
    two.plug()
    assert not [track for track in two.lab.ping_matrix() if track.lost]

    joins = []
    for n in range(1, 11):
        write_slice(two, one, other, extra=n)
        joins.append(took(lambda n=n: f"10.97.{99 + n}.0/24" in routes(one)))  # type: ignore[misc]
    print(
        f"slice written → route in the kernel: median {sorted(joins)[5] * 1000:.0f} ms, worst {max(joins) * 1000:.0f}"
    )

    kept = routes(one)
    two.plane.kill(APISERVER)
    two.end(one.name)
    assert routes(one) == kept
    one.run(["ip", "route", "flush", "proto", "111", "dev", "kbr0"])
    restarted = time.monotonic()
    start_again(two, one)
    back = took(lambda: routes(one) >= {str(other.pod_cidrs[0])})
    print(f"agent started without API → route back: {time.monotonic() - restarted:.2f} s ({back:.2f} s)")
    assert not [track for track in two.lab.ping_matrix() if track.lost]
    two.plane.start(APISERVER)
    write_slice(two, one, other, extra=30)
    eventually(lambda: "10.97.129.0/24" in routes(one))


def start_again(cluster: ClusterLab, host: Host) -> None:
    """Start the agent with the token that it has, as the API server is away."""
    cluster.start_agent(host, cluster.plane.folder / f"agent-{host.name}.serviceaccount")


def test_once_and_the_other_commands_work_on_a_cluster_s_mesh(two: ClusterLab) -> None:
    one, other = two.lab.hosts
    config = two.plane.token_kubeconfig("once", two.plane.agent_token(one.name))
    where = [f"--node={one.name}", f"--ovsdb={one.ovsdb}", f"--state-dir={two.state(one)}"]

    def ovsmesh(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = ["ip", "netns", "exec", one.ns, sys.executable, "-m", "ovsmesh", *arguments]
        root = Path(__file__).parents[2]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, cwd=root)

    done = ovsmesh("agent", "--once", f"--kubeconfig={config}", *where)
    assert done.returncode == 1
    assert "there are no MeshSlices" in done.stderr
    write_slice(two, one, other)
    done = ovsmesh("agent", "--once", f"--kubeconfig={config}", *where)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "converged"), done.stderr
    assert routes(one) == {str(other.pod_cidrs[0])}
    done = ovsmesh("plan", f"--state-dir={two.state(one)}")
    assert (done.returncode, done.stdout) == (0, "nothing to change\n"), done.stderr
    done = ovsmesh("status", f"--state-dir={two.state(one)}")
    assert done.stdout.startswith(f"{one.name}: no agent runs") and "Converged    True" in done.stdout
    both = ovsmesh("agent", "--once", f"--kubeconfig={config}", "--mesh=/nowhere", *where)
    assert "give one of them" in both.stderr
    done = ovsmesh("agent", "--once", *where)
    assert "no mesh: give --mesh FILE, or --kubeconfig FILE" in done.stderr
