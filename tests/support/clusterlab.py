"""A cluster in a lab: hosts with real Open vSwitch, a real control plane on their underlay, real service accounts.

Agents and controllers start as the manifests start them, with tokens of their own that are bound to a pod on their
node. Nodes are put into the API as kubelets do. ovsmesh is driven by its command line only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from tests.support.controlplane import ControlPlane
from tests.support.kubekit import GROUP, install

CONTROLLER = "ovsmesh-controller"
STRATEGIC = "application/strategic-merge-patch+json"
_END_SECONDS = 60.0


class ClusterLab:
    """`lab` is up and was made with agents=False, `plane` runs inside its hub. Ends what it started, not these two."""

    def __init__(self, lab: Lab, plane: ControlPlane) -> None:
        self.lab, self.plane = lab, plane
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        install(plane)

    def __enter__(self) -> ClusterLab:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        for name in list(self._processes):
            self.end(name)

    # ------------------------------------------------------------ objects

    def mesh(self, **spec: Any) -> None:
        """Makes the Mesh, or changes these fields of its spec."""
        body = {"apiVersion": "ovsmesh.io/v1alpha1", "kind": "Mesh", "metadata": {"name": "default"}}
        first = body | {"spec": {"clusterCIDRs": ["10.97.0.0/16"]} | spec}
        answer = self.plane.call("POST", f"{GROUP}/meshes", first)
        if answer.status == 409:
            answer = self.plane.call(
                "PATCH", f"{GROUP}/meshes/default", {"spec": spec}, content_type="application/merge-patch+json"
            )
        assert answer.status in (200, 201), answer

    def add_node(self, host: Host, address: str = "") -> None:
        """A Node as the kubelet of `host` registers it; its status says the tunnel address."""
        cidrs = [str(cidr) for cidr in host.pod_cidrs]
        node = {"kind": "Node", "metadata": {"name": host.name}, "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs}}
        answer = self.plane.call("POST", "/api/v1/nodes", node)
        assert answer.status == 201, answer
        self.set_address(host, address or str(host.address))

    def set_address(self, host: Host, address: str) -> None:
        status = {"addresses": [{"type": "InternalIP", "address": address}]}
        path = f"/api/v1/nodes/{host.name}/status"
        answer = self.plane.call("PATCH", path, {"status": status}, content_type=STRATEGIC)
        assert answer.status == 200, answer

    def remove_node(self, host: Host) -> None:
        answer = self.plane.call("DELETE", f"/api/v1/nodes/{host.name}")
        assert answer.status == 200, answer

    def converged(self) -> dict[str, int]:
        """Name of each MeshNode that says Converged → peers installed there."""
        found: dict[str, int] = {}
        for item in self.plane.call("GET", f"{GROUP}/meshnodes").body.get("items", ()):
            status = item.get("status", {})
            if any(c["type"] == "Converged" and c["status"] == "True" for c in status.get("conditions", ())):
                found[item["metadata"]["name"]] = status["peers"]["installed"]
        return found

    # ------------------------------------------------------------ processes

    def start_agent(self, host: Host, login: Path | None = None) -> None:
        """As ovsmesh-agent's pod on this node; the Node must be in the API, unless there is a `login` already.

        `login` is a folder of agent_account(), or a kubeconfig.
        """
        login = login or self.agent_account(host)
        options = [f"--node={host.name}", f"--ovsdb={host.ovsdb}", f"--state-dir={self.state(host)}"]
        options.append("--listen=127.0.0.1:9474")
        if login.is_dir():
            self._start(host.name, host.ns, "agent", *options, account=login)
        else:
            self._start(host.name, host.ns, "agent", f"--kubeconfig={login}", *options)

    def agent_account(self, host: Host) -> Path:
        """The service account of the agent's pod there, with a new token, as the pod finds it mounted."""
        return self.plane.service_account_folder(f"agent-{host.name}", self.plane.agent_token(host.name))

    def agent_config(self, host: Host) -> Path:
        """A kubeconfig with a new token for the agent there."""
        return self.plane.token_kubeconfig(f"agent-{host.name}", self.plane.agent_token(host.name))

    def clean(self, host: Host) -> None:
        """Removes all that an agent, which has ended, made and knew on this host."""
        argv = [sys.executable, "-m", "ovsmesh", "cleanup", f"--ovsdb={host.ovsdb}", f"--state-dir={self.state(host)}"]
        host.run(argv, timeout=60)
        shutil.rmtree(self.state(host), ignore_errors=True)

    def start_controller(self, number: int = 1) -> str:
        """As pod `number` of ovsmesh-controller, beside the API server; the name to end it by."""
        name = f"controller{number}"
        node = self.lab.hosts[0].name
        config = self.plane.token_kubeconfig(name, self.plane.agent_token(node, account=CONTROLLER))
        listen = f"--listen=127.0.0.1:{9474 + number}"
        self._start(name, self.lab.hub, "controller", f"--kubeconfig={config}", listen)
        return name

    def end(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends the agent of that host, or that controller."""
        process = self._processes.pop(name)
        process.send_signal(how)
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_END_SECONDS)

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def log(self, name: str) -> str:
        return self._log(name).read_text(errors="replace")

    def logs(self, lines: int = 20) -> str:
        """The last lines of everybody, to print before a test fails."""
        return "\n".join(f"--- {name}\n" + "\n".join(self.log(name).splitlines()[-lines:]) for name in self._processes)

    def state(self, host: Host) -> Path:
        """The state directory of the agent there."""
        return host.state / "agent-kube"

    def plug(self) -> float:
        """Plugs all pods in, once every host has its kbr0, and lets hosts talk; seconds that it took."""
        start = time.monotonic()
        for host in self.lab.hosts:
            host.plug()
        self.lab.warm_up()
        return time.monotonic() - start

    def _log(self, name: str) -> Path:
        return self.plane.folder / f"ovsmesh-{name}.log"

    def _start(self, name: str, ns: str, *arguments: str, account: Path | None = None) -> None:
        assert name not in self._processes or self._processes[name].poll() is not None, f"{name} runs already"
        argv = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "ip",
            "netns",
            "exec",
            ns,
            sys.executable,
            "-m",
            *(["tests.support.pod_process", str(account)] if account else ["ovsmesh"]),
            *arguments,
        ]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        if account:
            server = urlsplit(self.plane.url)
            environment["KUBERNETES_SERVICE_HOST"] = str(server.hostname)
            environment["KUBERNETES_SERVICE_PORT"] = str(server.port)
        with self._log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
