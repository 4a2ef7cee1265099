"""What a user of Kubernetes does, from `kubectl apply -k manifests` to `kubectl delete -k manifests`.

Real kubelets, real containers, the image as `make image` builds it. The tests are the steps of one story, in the
order they stand here. node1 runs an Open vSwitch of its own, as a host may; the others get the DaemonSet's.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.lab import netns
from ovsmesh.lab.ping import Pair, Prober, ping
from tests.support import built
from tests.support.kubecluster import Cluster, eventually, mebibytes, processes

MANIFESTS = Path(__file__).parents[2] / "manifests"
POD_MTU = 1462
WEB = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "web"},
    "spec": {
        "replicas": 6,
        "selector": {"matchLabels": {"app": "web"}},
        "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 3}},
        "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {
                "terminationGracePeriodSeconds": 1,
                "automountServiceAccountToken": False,
                "topologySpreadConstraints": [
                    {
                        "maxSkew": 1,
                        "topologyKey": "kubernetes.io/hostname",
                        "whenUnsatisfiable": "DoNotSchedule",
                        "labelSelector": {"matchLabels": {"app": "web"}},
                        "matchLabelKeys": ["pod-template-hash"],
                    }
                ],
                "containers": [
                    {
                        "name": "web",
                        "image": "ovsmesh.test/pod:1",
                        "args": ["hostname >/www/index.html; exec httpd -f -p 8080 -h /www"],
                        "ports": [{"containerPort": 8080}],
                        "readinessProbe": {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1},
                    }
                ],
            },
        },
    },
}
SERVICE = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web"},
    "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
}
LINKS = ("all", "default", "eth0", "lo", "mgmt0")
STAYS = {f"file opt/cni/bin/{name}" for name in ("bridge", "host-local", "loopback", "portmap")}
STAYS |= {"sysctl net.ipv4.ip_forward = 1", "sysctl net.ipv4.conf.all.accept_redirects = 0"}
STAYS |= {f"sysctl net.ipv4.conf.{link}.forwarding = 1" for link in LINKS}
"""What is the node's, as others may have come to use it: plugins, and forwarding with what the kernel ties to it, on
which the kubelet's pods rely."""
pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("step")]
Figure = Callable[[str], None]


def get(ns: str, address: str, port: int) -> str:
    """What is answered there to a request from inside the namespace; "" for no answer within two seconds."""
    connection = http.client.HTTPConnection(address, port, timeout=2.0)
    try:
        netns.within(ns, connection.connect)
        connection.request("GET", "/")
        return connection.getresponse().read().decode().strip()
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


def web(story: Cluster) -> list[dict[str, Any]]:
    """The pods that serve."""
    return [pod for pod in story.pods("default", "app=web") if "deletionTimestamp" not in pod["metadata"]]


def serving(story: Cluster, count: int) -> list[dict[str, Any]]:
    """All pods of the service, once they are ready."""

    def check() -> list[dict[str, Any]] | None:
        pods = web(story)
        good = [
            p for p in pods if any(c["type"] == "Ready" and c["status"] == "True" for c in p["status"]["conditions"])
        ]
        return good if len(good) == len(pods) == count else None

    return list(eventually(check, 90, f"{count} pods that serve"))


def place(pod: dict[str, Any]) -> str:
    return str(pod["spec"]["nodeName"])


def all_reach_all(story: Cluster, pods: list[dict[str, Any]]) -> None:
    for source in pods:
        ns = story.attach(source)
        for target in pods:
            said = get(ns, target["status"]["podIP"], 8080)
            names = source["metadata"]["name"], target["metadata"]["name"]
            assert said == names[1], f"{names[0]} on {place(source)} asked {names[1]} on {place(target)}: {said!r}"


def pairs_across(story: Cluster, pods: list[dict[str, Any]]) -> list[Pair]:
    """One pod of each node to one of each other node."""
    one = {place(pod): pod for pod in pods}
    return [
        Pair(story.attach(a), b["status"]["podIP"], a["metadata"]["name"], b["metadata"]["name"])
        for a in one.values()
        for b in one.values()
        if a is not b
    ]


# ---------------------------------------------------------------- the story


def test_apply_makes_all_nodes_ready(story: Cluster, figure: Figure) -> None:
    nodes = story.add(1, 2, 3, own_switch=(1,))
    assert not any(story.ready(node.name) for node in nodes), "without ovsmesh no node has a network"
    story.remember()
    began = time.monotonic()
    story.plane.kubectl("apply", "-k", str(MANIFESTS))
    for node in nodes:
        if not node.own_switch:
            story.underlay(node)
    for node in nodes:
        eventually(lambda name=node.name: story.ready(name), 120, f"{node.name} to be ready")  # type: ignore[misc]
    figure(f"kubectl apply to all 3 Nodes Ready: {time.monotonic() - began:.1f} s")
    for name in ("daemonset/ovsmesh-agent", "deployment/ovsmesh-controller"):
        story.plane.kubectl("rollout", "status", "--namespace=ovsmesh", "--timeout=60s", name, timeout=70.0)


def test_every_pod_reaches_every_pod_and_the_service(story: Cluster, figure: Figure) -> None:
    for made in (WEB, SERVICE):
        story.plane.kubectl("apply", "-f", "-", text=json.dumps(made))
    pods = serving(story, 6)
    assert Counter(map(place, pods)) == {"node1": 2, "node2": 2, "node3": 2}
    all_reach_all(story, pods)
    address = story.plane.call("GET", "/api/v1/namespaces/default/services/web").body["spec"]["clusterIP"]
    names = {pod["metadata"]["name"] for pod in pods}
    for pod in pods:
        ns = story.attach(pod)
        answers: Counter[str] = Counter()

        def beyond_one_node(ns: str = ns, answers: Counter[str] = answers) -> bool:
            answers[get(ns, address, 80)] += 1
            return len(set(answers) - {""}) > 2

        # kube-proxy takes in one pod after the other
        eventually(beyond_one_node, 90, "answers of more pods than one node has")
        answers.update(get(ns, address, 80) or "none" for _ in range(10))
        assert set(answers) - {""} <= names, f"{pod['metadata']['name']} asked the service: {answers}"
    for track in ping(pairs_across(story, pods), count=5, size=POD_MTU, df=True):
        assert track.lost == 0, f"{track.pair}: packets of {POD_MTU} bytes do not pass whole"


def test_a_node_is_asked_through_the_api(story: Cluster, tmp_path: Path) -> None:
    """`kubectl ovsmesh …` as its user runs it: kubectl finds the plugin in the PATH."""
    plugin = tmp_path / "kubectl-ovsmesh"
    plugin.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from ovsmesh.cli.main import kubectl; kubectl()' \"$@\"\n")
    plugin.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{built.control_plane()['kubectl'].parent}:{os.environ['PATH']}",
        "KUBECONFIG": str(story.plane.kubeconfig()),
        "HOME": str(tmp_path),
    }

    def ask(*arguments: str) -> str:
        argv = [*story.plane.inside(), "kubectl", "ovsmesh", *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False, env=environment)
        assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    assert "all 2 peers ok" in ask("check", "--on", "node2").splitlines()[0]
    cells = [cell for row in json.loads(ask("matrix", "-o", "json"))["rows"] for cell in row["cells"]]
    assert [cell["state"] for cell in cells] == ["ok"] * 6
    source, destination, *_ = sorted(serving(story, 6), key=place)[::2]
    names = [f"default/{pod['metadata']['name']}" for pod in (source, destination)]
    assert destination["status"]["podIP"] in ask("trace", *names)
    assert "start" in ask("history", "--on", "node3")
    ask("bundle", "--on", "node1", "-o", str(tmp_path / "node1.tar.gz"))
    with tarfile.open(tmp_path / "node1.tar.gz") as archive:
        assert any(name.endswith("MANIFEST.txt") for name in archive.getnames())
    assert ask("status").startswith("3 nodes converged, and packets get through between all of them\n")


def test_what_it_takes(story: Cluster, figure: Figure) -> None:
    for component in ("agent", "controller", "ovs"):
        pods = story.pods("ovsmesh", f"app.kubernetes.io/component={component}")
        sizes = [mebibytes(pod["metadata"]["uid"]) for pod in pods]
        figure(f"memory of {component}: {', '.join(f'{size:.0f}' for size in sizes)} MiB, no pod restarted")
        restarts = sum(each["restartCount"] for pod in pods for each in pod["status"]["containerStatuses"])
        assert restarts == 0, f"{component}: {restarts} restarts"


def test_the_image_holds_no_more_than_it_needs(story: Cluster) -> None:
    (one, *_) = story.pods("ovsmesh", "app.kubernetes.io/component=controller")
    pids = [pid for pid in processes(one["metadata"]["uid"]) if any("ovsmesh" in w for w in netns.command_line(pid))]
    assert len(pids) == 1
    uids = Path(f"/proc/{pids[0]}/status").read_text().split("Uid:")[1].split()[:4]
    assert set(uids) == {"65534"}, "the controller is nobody"
    root = Path(f"/proc/{pids[0]}/root")
    tools = ("usr/bin/gcc", "usr/bin/make", "usr/bin/pip3", "opt/ovsmesh/bin/pip", "var/lib/apt/lists/lock")
    assert [tool for tool in tools if (root / tool).exists()] == []
    # one system id for every node of every cluster
    assert list((root / "etc/openvswitch").glob("*")) == []


def test_rolling_the_agents_loses_nothing(story: Cluster, figure: Figure) -> None:
    pods = serving(story, 6)
    before = {pod["metadata"]["uid"] for pod in story.pods("ovsmesh", "app.kubernetes.io/component=agent")}
    with Prober(pairs_across(story, pods), 0.012) as stream:
        began = time.monotonic()
        story.plane.kubectl("rollout", "restart", "--namespace=ovsmesh", "daemonset/ovsmesh-agent")
        wait = ["--namespace=ovsmesh", "daemonset/ovsmesh-agent", "--timeout=150s"]
        story.plane.kubectl("rollout", "status", *wait, timeout=170.0)
        took = time.monotonic() - began
    after = {pod["metadata"]["uid"] for pod in story.pods("ovsmesh", "app.kubernetes.io/component=agent")}
    assert len(after) == 3
    assert not before & after
    sent = sum(len(track.sent) for track in stream.tracks)
    lost = {track.pair: track.outages() for track in stream.tracks if track.lost}
    figure(f"agents rolled in {took:.1f} s: {sum(t.lost for t in stream.tracks)} of {sent} packets lost")
    assert not lost
    assert sent > 1000
    all_reach_all(story, pods)


def test_pods_are_back_when_their_bridge_was_deleted(story: Cluster, figure: Figure) -> None:
    pods = serving(story, 6)
    with Prober(pairs_across(story, pods), 0.02) as stream:
        at = time.time()
        story.nodes["node2"].run(["ip", "link", "del", "kbr0"])
        assert stream.wait(at, 30.0, run=5), "the pods of node2 have no network any more"
    longest = max((outage.seconds for track in stream.tracks for outage in track.outages(at)), default=0.0)
    figure(f"kbr0 of a node deleted: its running pods unreachable for {longest:.2f} s at most")
    all_reach_all(story, pods)


def test_a_node_that_is_deleted_is_gone_from_the_others(story: Cluster, figure: Figure) -> None:
    left = [story.nodes[name] for name in ("node1", "node2")]
    gone = story.nodes["node3"]
    cidr = story.node("node3")["spec"]["podCIDR"]
    story.plane.kubectl(
        "drain", "node3", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=60s", timeout=80.0
    )
    gone.end()
    began = time.monotonic()
    story.plane.kubectl("delete", "node", "node3")

    def traces() -> list[str]:
        found = []
        for node in left:
            for what in (node.run(["ip", "route"]), story.ovs(node, "--columns=options", "list", "interface")):
                found += [f"{node.name}: {each}" for each in (cidr, gone.tunnel_address) if each in what]
        return found

    eventually(lambda: not traces(), 120, "node3 to be gone from the others")
    figure(f"node deleted, gone from the others after {time.monotonic() - began:.1f} s")
    # Kubernetes collects these itself, after 40 to 60 s, and no Namespace ends before: not what is waited for here
    where = ["--namespace=ovsmesh", "--field-selector=spec.nodeName=node3"]
    story.plane.kubectl("delete", "pods", *where, "--force", "--grace-period=0")
    pods = serving(story, 6)
    assert Counter(map(place, pods)) == {"node1": 3, "node2": 3}
    all_reach_all(story, pods)


def test_a_new_node_joins(story: Cluster, figure: Figure) -> None:
    (node,) = story.add(4)
    story.underlay(node)
    eventually(lambda: story.ready("node4"), 120, "node4 to be ready")
    figure(f"a new node: from its kubelet's start to Ready: {time.monotonic() - story.loaded:.1f} s")
    story.plane.kubectl("rollout", "restart", "deployment/web")
    story.plane.kubectl("rollout", "status", "deployment/web", "--timeout=90s", timeout=100.0)
    pods = serving(story, 6)
    assert Counter(map(place, pods)) == {"node1": 2, "node2": 2, "node4": 2}
    all_reach_all(story, pods)


def test_delete_leaves_nothing(story: Cluster, figure: Figure) -> None:
    story.plane.kubectl("delete", "deployment/web", "service/web", "--timeout=60s", timeout=70.0)
    eventually(lambda: not story.pods("default"), 60, "the pods of the service to end")
    nodes = [story.nodes[name] for name in ("node1", "node2", "node4")]
    for node in nodes:
        if not node.own_switch:
            # it is the administrator's, and so would be the database that holds it
            story.ovs(node, "del-br", "br-phy")
    began = time.monotonic()
    story.plane.kubectl("delete", "-k", str(MANIFESTS), "--timeout=120s", timeout=130.0)
    figure(f"kubectl delete -k: {time.monotonic() - began:.1f} s")
    left: dict[str, set[str]] = {}

    def clean() -> bool:
        left.update({node.name: story.traces(node) - STAYS for node in nodes})
        return not any(left.values())

    eventually(clean, 120, "all of ovsmesh to be gone from the nodes", lambda: left)
    figure(f"kubectl delete to the last trace gone: {time.monotonic() - began:.1f} s")
    kinds = "crd,clusterroles,clusterrolebindings,validatingadmissionpolicies,validatingadmissionpolicybindings,ns"
    assert "ovsmesh" not in story.plane.kubectl("get", kinds, "--output=name")
