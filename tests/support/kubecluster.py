"""A real cluster on this machine: a control plane, and nodes with real kubelets, in network namespaces.

Each node has two links: one to the API server and the other kubelets, and `eth0`, into the underlay that tunnels
go through. This machine's kernel may have no Open vSwitch, so each node's switch forwards in userspace, and holds
eth0 in a bridge of its own, br-phy: what an administrator of such a host sets up, and not ovsmesh.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ovsmesh.lab import netns
from tests.support import built
from tests.support.controlplane import ControlPlane
from tests.support.kubenode import CLUSTER_CIDR, KubeNode, cgroup_remove
from tests.support.needs import needs

_OURS = re.compile(r"(oe\d+)-.*")
_TICKS = os.sysconf("SC_CLK_TCK")
_FIRST = -15
"""Nice value."""
_POLL = 0.1
UNDERLAY_MTU = 1500
_OTHERS = ("var/lib/kubelet/", "var/lib/containerd/", "var/log/", "tmp/", "var/tmp/", "root/", "etc/kubernetes/")
"""Where the kubelet and containerd write."""
_SYSCTLS = r"^net\.(ipv[46]\.(conf|ip_forward)|bridge)"
_OF_LINK = re.compile(r"conf\.(?!all|default|mgmt0|eth0|lo)")
"""Settings of a link go with it."""
_HUB_ADDRESS = "172.30.0.1"
_RULES = "table netdev lab { chain in { type filter hook ingress device eth0 priority 0; policy drop; }; }"
"""The kernel must not answer ARP for what br-phy owns."""


class Plane(ControlPlane):
    """As in the other tests, but with all controllers, a scheduler, and the Service that pods reach it by."""

    def __init__(self, folder: Path, ns: str) -> None:
        super().__init__(folder, address=_HUB_ADDRESS, ns=ns, pod_cidrs=CLUSTER_CIDR)
        certificate, key = self.authority.sign("kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client")
        self._apiserver_options = (
            "--endpoint-reconciler-type=lease",
            f"--advertise-address={_HUB_ADDRESS}",
            f"--kubelet-client-certificate={certificate}",
            f"--kubelet-client-key={key}",
            # as kubeadm sets it: no DNS here knows the nodes' names
            "--kubelet-preferred-address-types=InternalIP",
        )
        self._scheduler: subprocess.Popen[bytes] | None = None

    def _manager(self) -> list[str]:
        options = super()._manager()
        return [option for option in options if not option.startswith("--controllers=")] + [
            # a node that is switched off is to be noticed soon
            "--node-monitor-grace-period=12s",
            "--node-monitor-period=2s",
        ]

    def start_scheduler(self) -> None:
        config = self.kubeconfig("system:kube-scheduler")
        argv = ["setpriv", "--pdeathsig", "KILL", *self.inside()]
        argv.append(str(built.kubernetes()["kube-scheduler"]))
        argv += [f"--{which}kubeconfig={config}" for which in ("", "authentication-", "authorization-")]
        with (self.folder / "kube-scheduler.log").open("ab") as log:
            self._scheduler = subprocess.Popen(
                [*argv, "--leader-elect=false", "--bind-address=127.0.0.1"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def stop(self, *names: str, **how: Any) -> None:
        if not names and self._scheduler is not None:
            self._scheduler.kill()
            self._scheduler.wait(10)
            self._scheduler = None
        super().stop(*names, **how)


@needs("e2e")
class Cluster:
    """Up when entered; leaves no process, namespace, mount, cgroup or file when left, however that comes."""

    def __init__(self, folder: Path, images: Sequence[Path]) -> None:
        self.name = f"oe{os.getpid()}"
        self.folder, self._images = folder, images
        self.hub = f"{self.name}-hub"
        self.plane: Plane
        self.nodes: dict[str, KubeNode] = {}
        self.loaded = 0.0
        """When the last node had its images (monotonic seconds)."""
        self._before: dict[str, set[str]] = {}
        self._early: dict[str, set[str]] = {}
        self._ending = ExitStack()

    # ------------------------------------------------------------ up and down

    def __enter__(self) -> Cluster:
        try:
            self._hub()
            self.plane = Plane(self.folder / "plane", self.hub)
            self._ending.callback(self.plane.kill)
            self.plane.start()
            self.plane.start_scheduler()
            self.plane.kubectl("apply", "-f", "-", text=_PROXY_RIGHTS)
        except BaseException:
            self._ending.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def _hub(self) -> None:
        self._ending.callback(self._no_namespaces)
        netns.ip_batch([f"netns add {self.hub}"])
        lines = ["link set lo up"]
        for bridge, address in (("mgmt", f"{_HUB_ADDRESS}/16"), ("under", "192.0.2.1/24")):
            lines += [f"link add {bridge} mtu {UNDERLAY_MTU} type bridge mcast_snooping 0", f"link set {bridge} up"]
            lines.append(f"addr add {address} dev {bridge}")
        netns.sysctl(self.hub, {"net/ipv6/conf/default/disable_ipv6": "1"})
        netns.ip_batch(lines, self.hub)
        netns.tx_checksum_off(self.hub, "under")

    def _no_namespaces(self) -> None:
        mine = sorted(ns for ns in netns.namespaces() if ns.startswith(f"{self.name}-"))
        netns.end(netns.inhabitants(mine))
        netns.ip_batch(f"netns del {ns}" for ns in mine)

    def add(self, *indexes: int, own_switch: Sequence[int] = ()) -> list[KubeNode]:
        """Starts these nodes side by side; returns when each is registered and has its images."""
        made = []
        for index in indexes:
            node = KubeNode(self.name, index, self.folder / f"node{index}", self.plane, index in own_switch)
            self._cables(node)
            node.prepare()
            self._ending.callback(node.end)
            self.nodes[node.name] = node
            node.start()
            made.append(node)
        with ThreadPoolExecutor(len(made)) as pool:
            list(pool.map(self._furnish, made))
        return made

    def _furnish(self, node: KubeNode) -> None:
        node.await_runtime()
        self._early[node.name] = _state(node) | {"nft table netdev lab"}
        node.load(self._images)
        self.loaded = time.monotonic()
        eventually(lambda: self.node(node.name).get("spec", {}).get("podCIDR"), 60, f"{node.name} to be registered")
        # eth0 is not where the kubelet lives
        self.plane.kubectl("annotate", "node", node.name, f"ovsmesh.io/tunnel-address={node.tunnel_address}")
        if node.own_switch:
            start_switch(node)
            self.underlay(node)

    def _cables(self, node: KubeNode) -> None:
        netns.ip_batch([f"netns add {node.ns}"])
        quiet = {"net/ipv6/conf/default/disable_ipv6": "1", "net/ipv6/conf/all/disable_ipv6": "1"}
        netns.sysctl(node.ns, {**quiet, "net/ipv4/icmp_ratelimit": "0"})
        lines = []
        for bridge, end, mac in (("mgmt", "mgmt0", "01"), ("under", "eth0", "02")):
            port = f"{bridge[0]}{node.index}"
            address = f"02:00:00:{mac}:00:{node.index:02x}"
            mtu = UNDERLAY_MTU
            peer = f"name {end} address {address} mtu {mtu} netns {node.ns}"
            lines += [f"link add {port} mtu {mtu} type veth peer {peer}", f"link set {port} master {bridge} up"]
        netns.ip_batch(lines, self.hub)
        lines = ["link set lo up", "link set mgmt0 up", "link set eth0 up"]
        lines += [f"addr add {node.address}/16 dev mgmt0", f"route add default via {_HUB_ADDRESS}"]
        netns.ip_batch(lines, node.ns)
        netns.tx_checksum_off(node.ns, "mgmt0")

    def underlay(self, node: KubeNode) -> None:
        """Gives eth0 to the node's switch, and the tunnel address to br-phy, once there is a switch."""
        eventually(lambda: Path(node.root, "run/openvswitch/db.sock").is_socket(), 90, f"the switch of {node.name}")
        netns.run(["nft", "-f", "-"], node.ns, text=_RULES)
        netns.tx_checksum_off(node.ns, "eth0")
        bridge = ["add-br", "br-phy", "--", "set", "bridge", "br-phy", "datapath_type=netdev"]
        self.ovs(node, *bridge, "--", "add-port", "br-phy", "eth0")
        netns.ip_batch(["link set br-phy up", f"addr add {node.tunnel_address}/24 dev br-phy"], node.ns)
        netns.tx_checksum_off(node.ns, "br-phy")
        _hurry(node)

    # ------------------------------------------------------------ traces

    def remember(self) -> None:
        """What each node has by now is no trace of ovsmesh: kube-proxy's rules too, which come some time after it."""
        for node in self.nodes.values():
            rules = ["iptables", "-w", "-S", "FORWARD"]
            # called before the loop goes on
            eventually(lambda: "KUBE-FORWARD" in node.run(rules, check=False), 60, f"kube-proxy of {node.name}")  # noqa: B023
        self._before = {name: _state(node) for name, node in self.nodes.items()}

    def traces(self, node: KubeNode) -> set[str]:
        """What the node has now, and no node had when remember() was called, nor this one when it started."""
        return _state(node).difference(*self._before.values(), self._early[node.name])

    # ------------------------------------------------------------ asking

    def node(self, name: str) -> dict[str, Any]:
        answer = self.plane.call("GET", f"/api/v1/nodes/{name}")
        return answer.body if answer.status == 200 else {}

    def ready(self, name: str) -> bool:
        """Whether pods can be placed there: Ready, and without the taint it registered with."""
        found = self.node(name)
        conditions = {c["type"]: c["status"] for c in found.get("status", {}).get("conditions", ())}
        taints = {taint["key"] for taint in found.get("spec", {}).get("taints", ())}
        return conditions.get("Ready") == "True" and not taints

    def pods(self, namespace: str, label: str = "") -> list[dict[str, Any]]:
        query = f"?labelSelector={label}" if label else ""
        return list(self.plane.call("GET", f"/api/v1/namespaces/{namespace}/pods{query}").body.get("items", ()))

    def ovs(self, node: KubeNode, *arguments: str) -> str:
        """What ovs-vsctl says there, of whichever switch the node has."""
        return node.run(["ovs-vsctl", "--timeout=10", "--db=unix:/run/openvswitch/db.sock", *arguments])

    def logs(self) -> str:
        told = ["get nodes,pods -A -o wide", "get events -A", "get meshnodes -o yaml"]
        shown = [self.plane.kubectl(*words.split(), check=False) for words in told]
        return "\n".join([*shown, *(node.logs() for node in self.nodes.values())])

    def attach(self, pod: dict[str, Any]) -> str:
        """The name of a network namespace that is this pod's: made here, so that what watches pods can enter it."""
        uid, node = pod["metadata"]["uid"], self.nodes[pod["spec"]["nodeName"]]
        name = f"{self.name}-p{uid[:8]}"
        if name in netns.namespaces():
            return name
        for found in processes(uid):
            netns.ip_batch([f"netns attach {name} {found}"])
            return name
        raise AssertionError(f"no process of pod {pod['metadata']['name']} on {node.name}\n{node.logs()}")


def _state(node: KubeNode) -> set[str]:
    """Links, routes, neighbours, rules of filters, settings and files, each as a line."""
    found = set()
    for link in json.loads(node.run(["ip", "-json", "link"])):
        found.add(f"link {link['ifname']}")
    for command in (["ip", "route", "show", "table", "all"], ["ip", "neigh", "show", "nud", "permanent"]):
        found |= {f"{command[1]} {line.strip()}" for line in node.run(command).splitlines()}
    found |= {f"nft {line}" for line in node.run(["nft", "list", "tables"]).splitlines()}
    for tool in ("iptables", "ip6tables"):
        found |= {f"{tool} {line}" for line in node.run([tool, "-S", "FORWARD"], check=False).splitlines()}
    sysctls = node.run(["sysctl", "-a", "--pattern", _SYSCTLS], check=False).splitlines()
    found |= {f"sysctl {line}" for line in sysctls if not _OF_LINK.search(line)}
    run = Path(node.root, "run/openvswitch")
    found |= {f"file run/openvswitch/{path.name}" for path in run.glob("*")}
    return found | {f"file {path}" for path in node.written() if not path.startswith(_OTHERS)}


def _hurry(node: KubeNode) -> None:
    """The kernel's datapath runs when a packet comes; one in userspace waits for the CPU as any process does."""
    for pid in netns.inhabitants([node.ns]):
        if netns.command_line(pid.pid)[:1] == ["ovs-vswitchd"]:
            for task in os.listdir(f"/proc/{pid.pid}/task"):
                os.setpriority(os.PRIO_PROCESS, int(task), _FIRST)


def processes(uid: str) -> list[int]:
    """Pids, as this process sees them, of the pod with this uid."""
    pids = filter(str.isdigit, os.listdir("/proc"))
    return [int(pid) for pid in pids if f"pod{uid}" in _text(Path(f"/proc/{pid}/cgroup"))]


def mebibytes(uid: str) -> float:
    """Resident memory of the pod with this uid, as the sum over its processes."""
    found = (re.search(r"VmRSS:\s*(\d+) kB", _text(Path(f"/proc/{pid}/status"))) for pid in processes(uid))
    return sum(int(match[1]) for match in found if match) / 1024


def end_orphans() -> None:
    """Ends what is left of clusters whose maker has ended without doing it; their processes died with it."""
    spaces: dict[str, list[str]] = {}
    for ns in netns.namespaces():
        if match := _OURS.fullmatch(ns):
            spaces.setdefault(match[1], []).append(ns)
    for name, mine in spaces.items():
        maker = netns.identity(int(name[2:]))
        made = min((netns.NETNS / ns).stat().st_mtime for ns in mine)
        born = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + (maker.start / _TICKS if maker else 0.0)
        # a process of that number which is younger than the cluster is another one
        if maker is None or born > made:
            netns.end(netns.inhabitants(mine))
            netns.ip_batch(f"netns del {ns}" for ns in mine)
            cgroup_remove(name)


def start_switch(node: KubeNode) -> None:
    """As an init script of the host does."""
    Path(node.root, "etc/openvswitch").mkdir(parents=True, exist_ok=True)
    run = "/run/openvswitch"
    node.run(["mkdir", "-p", run])
    node.run(["ovsdb-tool", "create", "/etc/openvswitch/conf.db", "/usr/share/openvswitch/vswitch.ovsschema"])
    common = ["--detach", "--no-chdir", "-vconsole:off"]
    database = [f"--remote=punix:{run}/db.sock", f"--pidfile={run}/ovsdb-server.pid"]
    node.run(["ovsdb-server", "/etc/openvswitch/conf.db", *database, *common])
    node.run(["ovs-vsctl", "--no-wait", f"--db=unix:{run}/db.sock", "init"])
    node.run(["ovs-vswitchd", f"unix:{run}/db.sock", f"--pidfile={run}/ovs-vswitchd.pid", *common])


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def eventually(check: Callable[[], Any], seconds: float, what: str, why: Callable[[], object] = str) -> Any:
    """What `check` gives once that is true; fails with what `why` gives."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}, in vain {why()}"
        time.sleep(_POLL)
    return found


@contextmanager
def cluster(folder: Path, images: Sequence[Path]) -> Iterator[Cluster]:
    """A cluster without nodes; its files are gone afterwards."""
    end_orphans()
    made = Cluster(folder, images)
    try:
        with made:
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_PROXY_RIGHTS = json.dumps(
    {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": "test-kube-proxy"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"},
        "subjects": [{"kind": "User", "name": "system:kube-proxy", "apiGroup": "rbac.authorization.k8s.io"}],
    }
)
