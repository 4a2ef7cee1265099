"""One node of the test cluster: a network namespace, and in it a containerd, a kubelet and a kube-proxy of its own.

Its first process is nodeinit.py, so its end is the end of all that runs there.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovsmesh.lab import netns
from tests.support import built
from tests.support.controlplane import ControlPlane

CLUSTER_CIDR = "10.244.0.0/16"
_INIT = Path(__file__).with_name("nodeinit.py")
_CGROUPS = Path("/sys/fs/cgroup")
_FIRST = {"cpu.shares": "262144", "cpu.weight": "10000"}
"""The kernel's datapath runs when a packet comes; one in a pod must not wait for everything else on this machine."""
_IMPORT_SECONDS = 120.0
_START_SECONDS = 60.0


@dataclass
class KubeNode:
    """Node number `index` (from 1) of the cluster `cluster`, whose files are in `folder`."""

    cluster: str
    index: int
    folder: Path
    plane: ControlPlane
    own_switch: bool = False
    """Whether the host runs an Open vSwitch of its own, so that the DaemonSet's has nothing to do."""
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _init: int = 0

    @property
    def name(self) -> str:
        return f"node{self.index}"

    @property
    def ns(self) -> str:
        return f"{self.cluster}-{self.name}"

    @property
    def address(self) -> str:
        """Where the API server and the other nodes reach its kubelet."""
        return f"172.30.1.{self.index}"

    @property
    def tunnel_address(self) -> str:
        return f"192.0.2.{10 + self.index}"

    @property
    def _cgroup(self) -> str:
        return f"{self.cluster}/{self.name}"

    # ------------------------------------------------------------ start and end

    def prepare(self) -> None:
        """Writes the node's configuration, certificates included: not in two threads at once."""
        self.folder.mkdir(parents=True)
        programs = {"containerd": ["containerd", "--config", self._containerd()]}
        programs["kubelet"] = self._kubelet()
        programs["kube-proxy"] = self._proxy()
        self._config.write_text(json.dumps({"name": self.name, "programs": programs}))

    @property
    def _config(self) -> Path:
        return self.folder / "node.json"

    def start(self) -> None:
        """Starts the node; to be called in the thread that lives longest, as the node ends with it."""
        _cgroup_make(self._cgroup)
        # the kernel ends the node should this process (to be exact, this thread) die without a word
        spaces = ["unshare", "--mount", "--propagation=private", "--pid", "--uts", "--fork", "--kill-child"]
        argv = ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net=/run/netns/{self.ns}", *spaces]
        with (self.folder / "node.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*argv, sys.executable, str(_INIT), str(self._config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def await_runtime(self) -> None:
        self._until("containerd", lambda: (self.folder / "ready").exists())

    def load(self, archives: Sequence[Path]) -> None:
        """Brings images into its containerd; the node goes on starting when it has them."""
        for archive in archives:
            self.run(["ctr", "-n", "k8s.io", "images", "import", str(archive)], _IMPORT_SECONDS)
        (self.folder / "loaded").touch()

    def end(self) -> None:
        """As a machine that loses its power; nothing of it stays but its log files."""
        if self._process is not None:
            if self._init:
                # through unshare would be enough, but then nobody waits for the end of what runs inside
                netns.end([p for p in [netns.identity(self._init)] if p], signal.SIGKILL, 20.0)
            self._process.kill()
            self._process.wait(20)
            self._process = None
        cgroup_remove(self._cgroup)

    def _until(self, what: str, check: Any) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not check():
            dead = self._process is None or self._process.poll() is not None
            if dead or time.monotonic() > deadline:
                raise AssertionError(f"{self.name}: {what} did not come up\n{self.logs()}")
            time.sleep(0.05)

    # ------------------------------------------------------------ looking in

    @property
    def init(self) -> int:
        """The pid, as this process sees it, of the node's first process."""
        if not self._init:
            assert self._process is not None, f"{self.name} does not run"
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            self._init = int(children[0])
        return self._init

    @property
    def root(self) -> Path:
        """The node's file system."""
        return Path(f"/proc/{self.init}/root")

    def run(self, argv: list[str], timeout: float = 20.0, check: bool = True) -> str:
        """What a command says that is run as on the node's console. Raises labnet.LabError."""
        inside = ["nsenter", "--target", str(self.init), "--mount", "--net", "--pid", "--uts", "--"]
        return netns.run([*inside, *argv], timeout=timeout, check=check).stdout

    def written(self) -> set[str]:
        """Paths of all files that were made or changed on the node's root since it started."""
        seen = self.folder / "seen"
        top = Path(f"/proc/{self.init}/root") / seen.relative_to("/")
        return {str(Path(at, name).relative_to(top)) for at, _, names in os.walk(top) for name in names}

    def logs(self, lines: int = 25) -> str:
        shown = []
        for path in [*sorted(self.folder.glob("*.log")), *sorted(self.folder.glob("pods/*/*/*.log"))]:
            text = path.read_text(errors="replace").splitlines()
            where = path.relative_to(self.folder)
            shown.append("\n".join([f"--- {self.name} {where} (last {lines} of {len(text)} lines)", *text[-lines:]]))
        return "\n".join(shown)

    # ------------------------------------------------------------ configuration

    def _containerd(self) -> str:
        config = self.folder / "containerd.toml"
        config.write_text(
            """version = 2
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "ovsmesh.test/pod:1"
  restrict_oom_score_adj = true
  disable_tcp_service = true
"""
        )
        return str(config)

    def _kubelet(self) -> list[str]:
        config = self.folder / "kubelet.json"
        x509 = {"clientCAFile": str(self.plane.ca)}
        config.write_text(
            json.dumps(
                {
                    "apiVersion": "kubelet.config.k8s.io/v1beta1",
                    "kind": "KubeletConfiguration",
                    "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
                    "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True}, "x509": x509},
                    "authorization": {"mode": "Webhook"},
                    "cgroupDriver": "cgroupfs",
                    "cgroupRoot": f"/{self._cgroup}",
                    "failCgroupV1": False,
                    "failSwapOn": False,
                    "enforceNodeAllocatable": [],
                    "evictionHard": {"memory.available": "1Mi"},
                    "imageGCHighThresholdPercent": 100,
                    "podLogsDir": str(self.folder / "pods"),
                    "registerWithTaints": [{"key": "node.ovsmesh.io/agent-not-ready", "effect": "NoSchedule"}],
                }
            )
        )
        access = self.plane.kubeconfig(f"system:node:{self.name}", "system:nodes")
        return [
            str(built.kubernetes()["kubelet"]),
            f"--config={config}",
            f"--kubeconfig={access}",
            f"--node-ip={self.address}",
        ]

    def _proxy(self) -> list[str]:
        config = self.folder / "proxy.json"
        untouched = {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}
        config.write_text(
            json.dumps(
                {
                    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                    "kind": "KubeProxyConfiguration",
                    "clientConnection": {"kubeconfig": str(self.plane.kubeconfig("system:kube-proxy"))},
                    "clusterCIDR": CLUSTER_CIDR,
                    "mode": "iptables",
                    "conntrack": untouched,
                }
            )
        )
        return [str(built.kubernetes()["kube-proxy"]), f"--config={config}"]


# ---------------------------------------------------------------- cgroups


def _hierarchies() -> list[Path]:
    """The places where a group of processes is made: one with cgroup v2, several with v1."""
    if (_CGROUPS / "cgroup.controllers").exists():
        return [_CGROUPS]
    return sorted(path for path in _CGROUPS.iterdir() if (path / "cgroup.procs").exists())


def _cgroup_make(name: str) -> None:
    """The kubelet wants its root cgroup to be there, in every hierarchy."""
    for top in _hierarchies():
        path = top
        for part in name.split("/"):
            above, path = path, path / part
            path.mkdir(exist_ok=True)
            for knob, most in _FIRST.items():
                if (path / knob).exists():
                    (path / knob).write_text(most)
            for knob in ("cpuset.cpus", "cpuset.mems"):
                if (path / knob).exists() and not (path / knob).read_text().strip():
                    (path / knob).write_text((above / knob).read_text())
            if (above / "cgroup.subtree_control").exists():
                wanted = (above / "cgroup.controllers").read_text().split()
                (above / "cgroup.subtree_control").write_text(" ".join(f"+{each}" for each in wanted))


def cgroup_remove(name: str) -> None:
    """Removes the groups of processes, once the kernel has let go of those that were in them."""
    for top in _hierarchies():
        for at, _, _ in os.walk(top / name, topdown=False):
            _rmdir(Path(at))
        above = (top / name).parent
        if above != top and above.is_dir() and not any(entry.is_dir() for entry in above.iterdir()):
            _rmdir(above)


def _rmdir(path: Path) -> None:
    deadline = time.monotonic() + 10.0
    while path.exists():
        try:
            path.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
