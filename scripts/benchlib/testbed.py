"""One host with many peers that do not exist: a lab of one host, a mesh file of thousands of nodes.

The host is read back with the system's own tools (ovs-vsctl, ovs-ofctl, ip, bridge, nft), so no figure rests on what
the agent says of itself.
"""

from __future__ import annotations

import csv
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchlib.peers import Peer, peer
from ovsmesh.lab import netns
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import LabError
from ovsmesh.names import API_VERSION, OBR


@dataclass(frozen=True)
class Plan:
    """What a run is to measure: with fewer tries or not, at which numbers of peers."""

    quick: bool
    sizes: tuple[int, ...]
    progress: Callable[[str], None]

    def tries(self, full: int, quick: int) -> int:
        """Return how many tries to make."""
        return quick if self.quick else full


@dataclass
class Testbed:
    """The host, its mesh file and its agent."""

    host: Host
    lab: Lab
    peers: list[Peer] = field(default_factory=list)

    @property
    def mesh(self) -> Path:
        """The mesh file."""
        return self.host.mesh

    def mesh_text(self, peers: Sequence[Peer]) -> str:
        """Return a mesh file of the host and these peers."""
        head = f"apiVersion: {API_VERSION}\nkind: Mesh\nmetadata: {{name: default}}\nspec:\n"
        head += "  clusterCIDRs: [10.0.0.0/8]\n  nodes:\n"
        me = self.host.node
        own = f"  - name: {me['name']}\n    address: {me['address']}\n    podCIDRs: {json.dumps(me['podCIDRs'])}\n"
        return head + own + "".join(p.text for p in peers)

    def put(self, peers: Sequence[Peer]) -> float:
        """Rename a new mesh file into place. Return the time just before the rename (CLOCK_MONOTONIC)."""
        temporary = self.mesh.with_name(".bench.tmp")
        temporary.write_text(self.mesh_text(peers))
        self.peers = list(peers)
        at = time.monotonic()
        os.rename(temporary, self.mesh)
        return at

    def command(self, name: str, *options: str) -> list[str]:
        """Return `ovsmesh NAME` with the host's options, to be run in its environment."""
        return [*self.host.command(name), *options]

    def ready(self, timeout: float = 60.0) -> None:
        """Wait until the agent is ready."""
        netns.wait_for("the agent to be ready", self.host.ready, timeout, every=0.02, hint=str(self.host.agent_log))

    def pid(self) -> int:
        """Return the agent's pid. Raises LabError when the agent has ended."""
        process = self.host.agent()
        if process is None:
            raise LabError(f"the agent has ended: {self.host.logs(10)}")
        return process.pid

    def readback(self) -> Readback:
        """Read everything once with the system's own tools."""
        host = self.host
        flows = host.ovs_ofctl("--no-names", "dump-flows", "obr0").splitlines()[1:]
        seen = time.monotonic()
        own = [line for line in flows if "cookie=0x6f76736d" in line]
        ages = [float(found[1]) for line in own if (found := re.search(r"duration=([0-9.]+)s", line))]
        lines = host.ovs_vsctl("--format=csv", "--no-heading", "--columns=name,ofport,type", "list", "Interface")
        interfaces = {row[0]: row[1] for row in csv.reader(lines.splitlines()) if row and row[2] == "gre"}
        lines = host.ovs_vsctl("--format=csv", "--no-heading", "--columns=name,protected", "list", "Port")
        protected = {row[0] for row in csv.reader(lines.splitlines()) if row and row[1] == "true"}
        routes = self._json("ip", "-j", "route", "show", "proto", "111")
        neighbours = self._json("ip", "-j", "neigh", "show", "dev", "kbr0", "nud", "permanent")
        fdb = self._json("bridge", "-j", "fdb", "show", "dev", "obr0")
        sets = host.run(["nft", "list", "set", "inet", "ovsmesh", "peers4"], check=False).stdout
        return Readback(
            ports={name for name, number in interfaces.items() if number.isdigit() and name in protected},
            flows=len(own),
            routes={r["dst"] for r in routes if r.get("type", "unicast") == "unicast"},
            neighbours={n["dst"] for n in neighbours},
            fdb={f["mac"] for f in fdb if f.get("state") == "static"},
            elements=set(re.findall(r"\d+\.\d+\.\d+\.\d+", sets)),
            last_flow=seen - min(ages) if ages else 0.0,
        )

    def _json(self, *argv: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.host.run(list(argv)).stdout or "[]")
        return found

    def check(self) -> Readback:
        """Read everything back and compare it with the mesh file's peers. Raises LabError when something is missing."""
        found = self.readback()
        wanted = {
            "ports": {p.port for p in self.peers},
            "routes": {p.cidr for p in self.peers},
            "neighbours": {p.gateway for p in self.peers},
            "fdb": {p.mac for p in self.peers},
            "elements": {p.address for p in self.peers},
        }
        for kind, want in wanted.items():
            have = getattr(found, kind)
            if have != want:
                missing, extra = sorted(want - have)[:3], sorted(have - want)[:3]
                raise LabError(
                    f"{len(want)} {kind} wanted, {len(have)} found; missing {missing}, extra {extra}; "
                    f"agent: {self.host.logs(5)}"
                )
        # to the peer, from its pods, from its tunnel address; the one that lets probes in, and the default flow
        if found.flows != 3 * len(self.peers) + 2:
            raise LabError(f"{3 * len(self.peers) + 2} flows wanted, {found.flows} found")
        return found

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Have all peers answer: the switch sends each probe back, as a peer would."""
        own = self.host.pod_cidrs[0][1]
        match = f"in_port=LOCAL,icmp,icmp_type=8,nw_src={own},nw_dst={own}"
        self.host.ovs_ofctl("add-flow", OBR, f"priority=200,{match},actions=mod_dl_dst:01:80:c2:00:00:01,IN_PORT")
        try:
            yield
        finally:
            self.host.ovs_ofctl("--strict", "del-flows", OBR, f"priority=200,{match}")

    def metric(self, name: str) -> float:
        """Return a metric of the agent. Raises LabError where there is none of that name."""
        text = self.host.http("/metrics", timeout=10.0)[1]
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        if not found:
            raise LabError(f"the agent has no metric {name}")
        return float(found[1])


class Readback(NamedTuple):
    """What the system's own tools show of the mesh."""

    ports: set[str]
    flows: int
    routes: set[str]
    neighbours: set[str]
    fdb: set[str]
    elements: set[str]
    last_flow: float
    """When the youngest flow was added (CLOCK_MONOTONIC, to the millisecond)."""


_TICK = os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """Return the children of a process, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *children(child)]
    return found


def cpu_seconds(pid: int) -> float:
    """Return the seconds of CPU that a process and its children, ended or running, have used."""
    total = 0.0
    for one in (pid, *children(pid)):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / _TICK
    return total


def mib(pid: int, field: str = "VmRSS", file: str = "status") -> float:
    """Return a field of a file below /proc/PID in MiB: "VmRSS" is the resident memory, "VmHWM" its highest value."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
    if not found:
        raise LabError(f"/proc/{pid}/{file} has no {field}")
    return int(found[1]) / 1024


@contextmanager
def testbed(peers: int) -> Iterator[Testbed]:
    """Make a host with Open vSwitch, a mesh file of `peers` peers, and no agent yet."""
    with Lab(1, 0, agents=False, ephemeral=True) as lab:
        made = Testbed(lab.host(1), lab)
        made.put([peer(n) for n in range(peers)])
        yield made
