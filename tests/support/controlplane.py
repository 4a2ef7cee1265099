"""A real control plane for tests: etcd, kube-apiserver and kube-controller-manager, with TLS, RBAC and tokens.

Each of them can be started, stopped, killed, paused and restarted. tests/support/reach.py reaches the API.
Runs on loopback, or inside a network namespace of a lab. Imports labnet, nothing else of ovsmesh.

    with ControlPlane(folder) as plane:
        plane.kubectl("apply", "-f", "-", text=manifest)
        agent = plane.token_kubeconfig("agent", plane.token("ovsmesh-agent", node="node1"))
"""

from __future__ import annotations

import http.client
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from ovsmesh.lab import netns
from tests.support import built
from tests.support.needs import needs
from tests.support.reach import ADMIN, ControlPlaneError, Reach

ETCD, APISERVER, MANAGER = "etcd", "kube-apiserver", "kube-controller-manager"
NAMES = (ETCD, APISERVER, MANAGER)

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
_POLL = 0.05
_SERVICES = "10.96.0.0/16"
_CONTROLLERS = (
    "serviceaccount-controller",
    "root-ca-certificate-publisher-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "validatingadmissionpolicy-status-controller",
)
"""What our objects need. Not those of DaemonSets and Deployments: nothing here could run their pods."""
_LIFECYCLE = ("node-lifecycle-controller", "taint-eviction-controller")
_PORTS = range(20000, 30000)
"""Below what Linux gives to connections, so that nobody takes a port while its owner is stopped."""


@needs("kube")
class ControlPlane(Reach):
    """`address` is where the API server listens, inside the network namespace `ns` ("" is this process's own).

    `pod_cidrs` lets kube-controller-manager give Nodes their podCIDRs out of these ranges; by default it does
    not. Nodes are not watched over (no kubelet keeps them alive here) unless `node_lifecycle`.
    """

    def __init__(
        self,
        folder: Path,
        address: str = "127.0.0.1",
        ns: str = "",
        pod_cidrs: str = "",
        node_lifecycle: bool = False,
        apiserver_options: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        ports = free_ports(4, address, ns)
        super().__init__(folder, address, ports[0], ns)
        self._etcd_port, self._peer_port, self._manager_port = ports[1:]
        self._pod_cidrs = pod_cidrs
        self._node_lifecycle = node_lifecycle
        self._apiserver_options = tuple(apiserver_options)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    # ------------------------------------------------------------ processes

    def __enter__(self) -> ControlPlane:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self, *names: str) -> ControlPlane:
        """Starts these (default: all) and waits until each is ready. What runs already is left alone."""
        for name in names or NAMES:
            if not self.running(name):
                self._spawn(name)
            self._until_ready(name)
        return self

    def stop(self, *names: str, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends these (default: all), the last started first; one that takes longer than 10 s is killed.

        The API server keeps open watches when it is told to end: SIGKILL cuts them, as a machine's death does.
        """
        for name in reversed(names or NAMES):
            process = self._processes.pop(name, None)
            if process is None:
                continue
            process.send_signal(signal.SIGCONT)
            process.send_signal(how)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_STOP_SECONDS)

    def kill(self, *names: str) -> None:
        """As stop, with SIGKILL."""
        self.stop(*names, how=signal.SIGKILL)

    def restart(self, *names: str, how: signal.Signals = signal.SIGTERM) -> None:
        self.stop(*names, how=how)
        self.start(*names)

    def pause(self, name: str) -> None:
        """Stalls it: connections stay open, nothing is answered. Returns when its last thread has stopped."""
        process = self._processes[name]
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)

    def resume(self, name: str) -> None:
        self._processes[name].send_signal(signal.SIGCONT)

    def running(self, name: str) -> bool:
        process = self._processes.get(name)
        return process is not None and process.poll() is None

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def log(self, name: str, lines: int = 40) -> str:
        """The last lines of what it wrote."""
        path = self.folder / f"{name}.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def _spawn(self, name: str) -> None:
        options = {ETCD: self._etcd, APISERVER: self._apiserver, MANAGER: self._manager}[name]()
        # The kernel ends it should this process die without a word; -- the pid stays the same through both.
        argv = ["setpriv", "--pdeathsig", "KILL", *self.inside(), str(built.control_plane()[name]), *options]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )

    def _etcd(self) -> list[str]:
        client, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{self._peer_port}"
        return [
            "--name=test",
            f"--data-dir={self.folder / 'etcd'}",
            "--unsafe-no-fsync",
            "--log-level=warn",
            *(f"--{which}-client-urls={client}" for which in ("listen", "advertise")),
            *(f"--{which}-peer-urls={peer}" for which in ("listen", "initial-advertise")),
            f"--initial-cluster=test={peer}",
        ]

    def _apiserver(self) -> list[str]:
        private, public = self.authority.token_keys()
        names = f"IP:{self.address},IP:127.0.0.1,IP:10.96.0.1,DNS:localhost,DNS:kubernetes.default.svc"
        certificate, key = self.authority.sign("apiserver", "/CN=kube-apiserver", names)
        return [
            f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
            f"--bind-address={self.address}",
            f"--secure-port={self.port}",
            "--endpoint-reconciler-type=none",
            f"--service-cluster-ip-range={_SERVICES}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            f"--client-ca-file={self.ca}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={public}",
            f"--service-account-signing-key-file={private}",
            "--allow-privileged=true",
            "--profiling=false",
            "--v=1",
            *self._apiserver_options,
        ]

    def _manager(self) -> list[str]:
        config = str(self.kubeconfig("system:kube-controller-manager"))
        private, _ = self.authority.token_keys()
        controllers = [*_CONTROLLERS, *(_LIFECYCLE if self._node_lifecycle else ())]
        if self._pod_cidrs:
            controllers.append("node-ipam-controller")
            addresses = ["--allocate-node-cidrs=true", f"--cluster-cidr={self._pod_cidrs}"]
        else:
            addresses = ["--allocate-node-cidrs=false"]
        return [
            *(f"--{which}kubeconfig={config}" for which in ("", "authentication-", "authorization-")),
            "--bind-address=127.0.0.1",
            f"--secure-port={self._manager_port}",
            "--leader-elect=false",
            # Without it the node IPAM controller may not read Nodes.
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={private}",
            f"--root-ca-file={self.ca}",
            f"--controllers={','.join(controllers)}",
            *addresses,
        ]

    def _until_ready(self, name: str) -> None:
        check: Callable[[], bool] = {ETCD: self._etcd_up, APISERVER: self._apiserver_up, MANAGER: self._manager_up}[
            name
        ]
        deadline = time.monotonic() + _START_SECONDS
        while not check():
            why = f"not ready after {_START_SECONDS:.0f} s" if time.monotonic() > deadline else ""
            code = self._processes[name].poll()
            if code is not None:
                why = f"ended with {code}"
            if why:
                raise ControlPlaneError(f"{name}: {why}\n{self.log(name)}")
            time.sleep(_POLL)

    def _etcd_up(self) -> bool:
        try:
            return self._http(http.client.HTTPConnection("127.0.0.1", self._etcd_port, timeout=2.0), "/health") == 200
        except (OSError, http.client.HTTPException):
            return False

    def _apiserver_up(self) -> bool:
        try:
            return self._http(self.connection(ADMIN, 2.0), "/readyz") == 200
        except (OSError, http.client.HTTPException):
            return False

    def _manager_up(self) -> bool:
        """Its controllers run some seconds after it does: their first visible work is what counts."""
        return self.call("GET", "/api/v1/namespaces/default/serviceaccounts/default").status == 200

    def _http(self, connection: http.client.HTTPConnection, path: str) -> int:
        try:
            self.connect(connection)
            connection.request("GET", path)
            return connection.getresponse().status
        finally:
            connection.close()


def free_ports(count: int, address: str = "127.0.0.1", ns: str = "") -> list[int]:
    def find() -> list[int]:
        found: list[int] = []
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for port in random.sample(_PORTS, len(_PORTS)):
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((address, port))
                except OSError:
                    continue
            found.append(port)
            if len(found) == count:
                break
        return found

    found = netns.within(ns, find) if ns else find()
    if len(found) < count:
        raise ControlPlaneError(f"wanted {count} free ports on {address}, found {len(found)}")
    return found
