"""One host of a lab, and its pods: namespaces, a real ovsdb-server and ovs-vswitchd, an agent.

Keeps nothing in memory: any process that knows the lab's name can take over.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

import ovsmesh
from ovsmesh.lab import netns
from ovsmesh.lab.capture import Capture
from ovsmesh.lab.netns import LabError, Process
from ovsmesh.lab.state import LabSettings, write
from ovsmesh.names import KBR

BR_PHY = "br-phy"
"""The OVS bridge that holds eth0 and the underlay address; on the userspace datapath only."""
_SCHEMA = Path("/usr/share/openvswitch/vswitch.ovsschema")
_UPTIME_GATE = 10.05
"""Seconds. In OVS 3.1.0 an ovs-vswitchd started before 10 s of uptime never gets upcall handlers; 3.1.1 fixes it."""
READYZ = ("127.0.0.1", 9474)


@dataclass(frozen=True, slots=True)
class Pod:
    """A namespace with an eth0 on its host's kbr0."""

    ns: str
    name: str
    addresses: tuple[IPv4Address | IPv6Address, ...]

    def run(self, argv: list[str], timeout: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the pod, as `netns.run` does."""
        return netns.run(argv, self.ns, timeout=timeout, check=check)


@dataclass(frozen=True, slots=True)
class Host:
    """Host number `index`, from 1, of a lab. Methods raise LabError, which says what to look at."""

    settings: LabSettings
    lab_state: Path
    """The state directory of the lab."""
    index: int

    @property
    def name(self) -> str:
        """The name of its node."""
        return f"h{self.index}"

    @property
    def ns(self) -> str:
        """Its network namespace."""
        return f"{self.settings.name}-{self.name}"

    @property
    def state(self) -> Path:
        """Its directory, with the state of Open vSwitch and the agent."""
        return self.lab_state / self.name

    @property
    def mesh(self) -> Path:
        """The mesh file of all hosts."""
        return self.lab_state / "mesh.yaml"

    @property
    def ovsdb(self) -> str:
        """The address of its Open vSwitch database."""
        return f"unix:{self.state}/db.sock"

    @property
    def address(self) -> IPv4Address | IPv6Address:
        """The tunnel address, from the documentation ranges (RFC 5737, RFC 3849)."""
        return ip_address(f"2001:db8::{10 + self.index}" if self.settings.underlay6 else f"192.0.2.{10 + self.index}")

    @property
    def pod_cidrs(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The ranges of its pods, one for each address family."""
        v4 = ip_network(f"10.97.{self.index}.0/24")
        return (v4, ip_network(f"fd00:97:{self.index}::/64")) if self.settings.dual_stack else (v4,)

    @property
    def node(self) -> dict[str, Any]:
        """The entry of this host in a mesh file."""
        return {"name": self.name, "address": str(self.address), "podCIDRs": [str(c) for c in self.pod_cidrs]}

    def pod(self, index: int) -> Pod:
        """Return pod number `index`, from 1."""
        if not 1 <= index <= self.settings.pods:
            raise LabError(f"pod {index} of {self.name}: there are pods 1 to {self.settings.pods}")
        addresses = tuple(cidr.network_address + 1 + index for cidr in self.pod_cidrs)
        return Pod(f"{self.ns}p{index}", f"{self.name}p{index}", addresses)

    @property
    def pods(self) -> list[Pod]:
        """All of its pods."""
        return [self.pod(n) for n in range(1, self.settings.pods + 1)]

    # --- running things

    @property
    def env(self) -> dict[str, str]:
        """Environment in which ovs-vsctl, ovs-ofctl, ovs-appctl and `python -m ovsmesh` act on this host."""
        package = str(Path(ovsmesh.__file__).resolve().parents[1])
        path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH", "")) if p)
        state = str(self.state)
        commands = ("BUNDLE", "CHECK", "CLEANUP", "CONFIRM", "HISTORY", "MATRIX", "PLAN", "STATUS", "TRACE")
        options = {f"OVSMESH_{c}_STATE_DIR": f"{state}/agent" for c in commands}
        # a lab leaves the machine's own Docker alone
        options["OVSMESH_AGENT_DOCKER"] = "off"
        return {"OVS_RUNDIR": state, "OVS_LOGDIR": state, "OVS_DBDIR": state, "PYTHONPATH": path, **options}

    def run(
        self, argv: list[str], timeout: float = 60.0, check: bool = True, text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the host, as `netns.run` does."""
        return netns.run(argv, self.ns, timeout=timeout, check=check, env=self.env, text=text)

    def ovs_vsctl(self, *args: str, timeout: float = 60.0) -> str:
        """Run ovs-vsctl and return what it prints."""
        return self.run(["ovs-vsctl", f"--db={self.ovsdb}", *args], timeout).stdout

    def ovs_ofctl(self, *args: str, timeout: float = 60.0) -> str:
        """Run ovs-ofctl and return what it prints."""
        return self.run(["ovs-ofctl", *args], timeout).stdout

    def ovs_appctl(self, *args: str, timeout: float = 60.0) -> str:
        """Run ovs-appctl on ovs-vswitchd and return what it prints."""
        pid = (self.state / "ovs-vswitchd.pid").read_text().strip()
        return self.run(["ovs-appctl", "-t", f"{self.state}/ovs-vswitchd.{pid}.ctl", *args], timeout).stdout

    def ovsmesh(self, command: str, *args: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run `ovsmesh COMMAND` with the options that this host's agent has, whatever its exit status is."""
        return self.run([*self.command(command), *args], timeout, check=False)

    def command(self, command: str, mesh: Path | None = None) -> list[str]:
        """Return `ovsmesh COMMAND` with the options that this host's agent has, to be run with `env`."""
        node = ["--mesh", str(mesh or self.mesh), "--node", self.name, "--ovsdb", self.ovsdb]
        state = ["--state-dir", str(self.state / "agent")]
        return [sys.executable, "-m", "ovsmesh", command, *(() if command == "history" else node), *state]

    def capture(self, device: str = "eth0") -> Capture:
        """Count what passes `device`, both ways. eth0 shows the encapsulated frames on either datapath."""
        return Capture(self.ns, device)

    # --- Open vSwitch

    def start_ovsdb(self) -> None:
        """Start ovsdb-server and return when it answers. Make the database if there is none."""
        self.state.mkdir(parents=True, exist_ok=True)
        database, log = self.state / "conf.db", self.state / "ovsdb-server.log"
        if not database.exists():
            if not _SCHEMA.exists():
                raise LabError(f"{_SCHEMA}: not found; install Open vSwitch (Debian, Ubuntu: openvswitch-switch)")
            self.run(["ovsdb-tool", "create", str(database), str(_SCHEMA)])
        pid = f"--pidfile={self.state}/ovsdb-server.pid"
        socket_path = f"--remote=punix:{self.state}/db.sock"
        self.run(["ovsdb-server", str(database), socket_path, pid, "--detach", "-vconsole:off", f"--log-file={log}"])

    def start_vswitchd(self, restore_wait: bool = True) -> None:
        """Start ovs-vswitchd and return when it has configured itself from the database.

        `restore_wait` sets flow-restore-wait first, as a service manager has to. The agent clears it once the flows
        are back; without an agent nothing is forwarded.
        """
        # nothing announces that the machine is up for so long
        time.sleep(max(0.0, _UPTIME_GATE - time.clock_gettime(time.CLOCK_MONOTONIC)))
        if restore_wait:
            self.ovs_vsctl("--no-wait", "set", "Open_vSwitch", ".", "other_config:flow-restore-wait=true")
        pid, log = f"--pidfile={self.state}/ovs-vswitchd.pid", f"--log-file={self.state}/ovs-vswitchd.log"
        # the userspace datapath is this process: unlike a kernel, it loses packets while it waits for a busy CPU
        first = ["nice", "-n", "-15"] if self.settings.datapath == "netdev" else []
        self.run([*first, "ovs-vswitchd", self.ovsdb, pid, "--detach", "-vconsole:off", log], timeout=60)
        if self.settings.datapath == "netdev" and BR_PHY in self.ovs_vsctl("list-br").split():
            # its tap devices ended with the process that held them
            self.address_underlay()

    def create_underlay(self) -> None:
        """Connect the host to the underlay: by eth0, or on the userspace datapath by a bridge that holds it."""
        if self.settings.datapath == "netdev":
            rules = "table netdev lab { chain in { type filter hook ingress device eth0 priority 0; policy drop; }; }"
            # the kernel must not answer ARP for br-phy's address, and ovs-vswitchd must see complete checksums
            self.run(["nft", "-f", "-"], text=rules)
            netns.tx_checksum_off(self.ns, "eth0")
            netns.sysctl(self.ns, {"net/ipv6/conf/eth0/disable_ipv6": "1"})
            netns.ip_batch(["link set eth0 up"], self.ns)
            self.ovs_vsctl(
                *("add-br", BR_PHY, "--", "set", "bridge", BR_PHY, "datapath_type=netdev"),
                *("--", "add-port", BR_PHY, "eth0"),
                # the switch only ever lowers it by itself
                *("--", "set", "interface", BR_PHY, f"mtu_request={self.settings.underlay_mtu}"),
            )
        self.address_underlay()

    def address_underlay(self) -> None:
        """Set address, state and default route of the underlay. Again after the userspace datapath lost its taps."""
        device = BR_PHY if self.settings.datapath == "netdev" else "eth0"
        lines = [f"link set {device} up", f"addr replace 192.0.2.{10 + self.index}/24 dev {device}"]
        if self.settings.underlay6 or self.settings.dual_stack:
            netns.sysctl(self.ns, {f"net/ipv6/conf/{device}/accept_dad": "0", f"net/ipv6/conf/{device}/accept_ra": "0"})
            lines.append(f"addr replace 2001:db8::{10 + self.index}/64 dev {device} nodad")
            lines.append(f"route replace default via 2001:db8::1 dev {device}")
        lines.append(f"route replace default via 192.0.2.1 dev {device}")
        netns.ip_batch(lines, self.ns)
        if device == BR_PHY:
            netns.tx_checksum_off(self.ns, BR_PHY)

    def daemon(self, name: str) -> Process | None:
        """Return ovsdb-server or ovs-vswitchd: the process of its pid file, if it is still this host's."""
        try:
            pid = int((self.state / f"{name}.pid").read_text())
        except (FileNotFoundError, ValueError):
            return None
        own = any(str(self.state) in argument for argument in netns.command_line(pid))
        return netns.identity(pid) if own else None

    def kill_ovsdb(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End ovsdb-server by a signal."""
        self._kill("ovsdb-server", how)

    def kill_vswitchd(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End ovs-vswitchd by a signal."""
        self._kill("ovs-vswitchd", how)

    def _kill(self, name: str, how: signal.Signals) -> None:
        process = self.daemon(name)
        if process is None:
            raise LabError(f"{name} of {self.ns}: not running; see {self.state / name}.log")
        netns.end([process], how)

    def restart_ovsdb(self) -> None:
        """Kill ovsdb-server and start it again."""
        self.kill_ovsdb()
        self.start_ovsdb()

    # --- the agent

    @property
    def agent_log(self) -> Path:
        """The log of its agent."""
        return self.state / "agent.log"

    def start_agent(self, *options: str, mesh: Path | None = None) -> Process:
        """Start this host's agent. `Lab.converged()` waits for what it does."""
        if running := self.agent():
            raise LabError(f"agent of {self.ns}: runs already as pid {running.pid}; stop_agent() first")
        (self.state / "agent").mkdir(parents=True, exist_ok=True)
        process = netns.spawn([*self.command("agent", mesh), *options], self.ns, self.agent_log, self.env)
        write(self.state / "agent.pid", json.dumps(process))
        return process

    def agent(self) -> Process | None:
        """Return the agent, by its recorded pid and start time; None when it does not run."""
        netns.reap()
        try:
            recorded = Process(*json.loads((self.state / "agent.pid").read_text()))
        except FileNotFoundError:
            return None
        return recorded if netns.identity(recorded.pid) == recorded else None

    def agent_alive(self) -> bool:
        """Return whether the agent runs."""
        return self.agent() is not None

    def stop_agent(self, how: signal.Signals = signal.SIGTERM, timeout: float = 60.0) -> None:
        """End the agent, if it runs, by a signal. Raises LabError when it runs on for `timeout` seconds."""
        if process := self.agent():
            netns.end([process], how, timeout)
        (self.state / "agent.pid").unlink(missing_ok=True)

    def http(self, path: str, timeout: float = 2.0) -> tuple[int, str]:
        """Return status and body of a GET from the agent, sent on the host; (0, reason) when it does not answer."""
        try:
            sock = netns.within(self.ns, lambda: socket.create_connection(READYZ, timeout))
            with sock:
                sock.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
                parts = []
                while part := sock.recv(65536):
                    parts.append(part)
        except OSError as error:
            return 0, str(error)
        head, _, body = b"".join(parts).partition(b"\r\n\r\n")
        status = head.split(None, 2)[1:2]
        return (int(status[0]) if status else 0), body.decode(errors="replace")

    def ready(self) -> bool:
        """Return whether the agent's /readyz says 200."""
        return self.http("/readyz")[0] == 200

    # --- pods

    def plug(self) -> None:
        """Plug every pod into kbr0, with its MTU. Again after kbr0 was replaced or its MTU changed."""
        mtu = int(json.loads(self.run(["ip", "-j", "link", "show", KBR]).stdout)[0]["mtu"])
        links = netns.within(self.ns, lambda: {name for _, name in socket.if_nameindex()})
        lines = []
        for number, pod in enumerate(self.pods, 1):
            if f"vp{number}" in links:
                lines.append(f"link set vp{number} mtu {mtu} master {KBR} up")
                netns.ip_batch([f"link set eth0 mtu {mtu}"], pod.ns)
            else:
                lines.append(f"link add vp{number} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {pod.ns}")
                lines.append(f"link set vp{number} addrgenmode none")
                lines.append(f"link set vp{number} master {KBR} up")
        netns.ip_batch(lines, self.ns)
        for number, pod in enumerate(self.pods, 1):
            if f"vp{number}" not in links:
                self._address(pod)

    def _address(self, pod: Pod) -> None:
        lines = ["link set lo up", "link set eth0 up"]
        for cidr, address in zip(self.pod_cidrs, pod.addresses, strict=True):
            lines.append(f"addr add {address}/{cidr.prefixlen} dev eth0{' nodad' if cidr.version == 6 else ''}")
            lines.append(f"route add default via {cidr.network_address + 1}")
        netns.ip_batch(lines, pod.ns)

    def logs(self, lines: int = 40, which: str = "*.log") -> str:
        """Return the last lines of each of this host's logs, for a failed test."""
        shown = []
        for path in sorted(self.state.glob(which)):
            text = path.read_text(errors="replace").splitlines()
            shown.append("\n".join([f"--- {path} (last {min(lines, len(text))} of {len(text)} lines)", *text[-lines:]]))
        return "\n".join(shown)
