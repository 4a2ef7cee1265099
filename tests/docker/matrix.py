"""Run one Docker through every situation of the matrix, first on docker0 without ovsmesh, then on kbr0 with it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_interface
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from ovsmesh.containers import docker_unit
from ovsmesh.lab import netns
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import LabError
from tests.docker import cells
from tests.docker.cells import CONTAINERS, GUEST, MESH, NETWORKS, NO_ANSWER, PUBLISHED, STATE, Observation, Probe
from tests.support.binaries import BinariesError
from tests.support.connections import FAILURES, Attempt, Servers, connect
from tests.support.debian import DebianError
from tests.support.docker_versions import Kind
from tests.support.dockerkit import Docker, links, power_cut, rules, until
from tests.support.labtools import ip_json

FILE = '{\n  "ipv6": true,\n  "fixed-cidr-v6": "fd00:d0c::/64"%s\n}\n'
SUBNETS = {
    "front": ("172.28.1.0/24", "fd00:d0c:1::/64"),
    "rear": ("172.28.2.0/24", "fd00:d0c:2::/64"),
    "inner": ("172.28.3.0/24", "fd00:d0c:3::/64"),
}
BRIDGES = ("docker0", "kbr0")
OUTSIDE = {
    "outside": ("192.0.2.1", "2001:db8::1"),
    "outside DOCKER-USER": ("192.0.2.2", "2001:db8::2"),
    "outside FORWARD": ("192.0.2.3", "2001:db8::3"),
    GUEST: ("192.0.2.4", "2001:db8::4"),
}
_OPEN, _HIDDEN, _HOST, _OUTSIDE = 80, 81, 82, 80
"""Ports that are listened on: of a container the one that may be published and one that is not; elsewhere one."""
_SECONDS = 2.5
"""In which an answer comes or does not: two SYNs."""
_ROUNDS = 6


class Matrix:
    """One lab of two hosts, the first with a Docker; what each situation answered."""

    def __init__(self, lab: Lab, docker: Docker) -> None:
        self._lab, self._docker, self._host, self._other = lab, docker, docker.host, lab.host(2)
        self._servers = Servers()
        self._story = self._tell()
        self._baseline: dict[str, Observation] = {}
        self._found: dict[str, Observation] = {}
        self._failed: Exception | None = None

    def close(self) -> None:
        self._servers.close()

    def differences(self, situation: str, group: str) -> list[str]:
        """Return what in a cell is not as it is on docker0, but for the differences that docs/docker.md names."""
        while situation not in self._found:
            if self._failed is not None:
                raise AssertionError(f"{situation} was not reached: {self._failed}")
            try:
                next(self._story)
            except Exception as error:  # any: it is raised here, and told by the cells that come after
                self._failed = error
                raise
        found = self._found[situation]
        wanted = cells.wanted(self._baseline[cells.SITUATIONS[situation]], situation)
        return [
            f"{probe}: wanted {wanted.get(probe)!r}, found {found.get(probe)!r}"
            for probe in sorted({*wanted, *found})
            if probe.group == group and wanted.get(probe) != found.get(probe)
        ]

    # ------------------------------------------------------------ the story

    def _tell(self) -> Iterator[None]:
        docker, host = self._docker, self._host
        self._surround()
        docker.again(self._file())
        self._create()
        self._baseline["plain"] = self._observe()
        self._reboot("")
        self._baseline["reboot"] = self._observe()
        docker.again(self._file(', "icc": false'))
        self._baseline["icc false"] = self._observe()
        docker.again(self._file())

        self._replace()
        self._lab.converged(120, [host], thorough=True)
        self._found[cells.SWITCH] = self._observe(cells.SWITCH)
        yield
        self._lab.write_mesh(clusterCIDRs=["10.97.0.0/16", "fd00:97::/32", "10.98.0.0/16", "fd00:98::/32"])
        self._lab.converged(120, [host], thorough=True)
        self._found["range added"] = self._observe("range added")
        yield
        self._spoil()
        self._found["rule repaired"] = self._observe("rule repaired")
        yield
        for first in ("agent", "Docker"):
            self._reboot(first)
            name = f"reboot, {first} first"
            self._found[name] = self._observe(name)
            yield
        self._cleanup()
        self._found["cleanup after reboot"] = self._observe("cleanup after reboot")
        yield
        assert docker.config.read_text() == self._file()
        shut = self._file(', "icc": false')
        docker.again(shut)
        host.start_agent("--docker", "replace", *docker.options)
        named = self._named(cells.REFUSED, "`icc: false`")
        pod = str(self._other.pod(1).addresses[0])
        until("the mesh", lambda: host.run(["ping", "-c1", "-W1", pod], check=False).returncode == 0, 60)
        self._found[cells.REFUSED] = {**self._observe(cells.REFUSED), **named}
        assert docker.on("docker0") and docker.config.read_text() == shut
        yield
        docker.configure(self._file())
        until("Docker on kbr0", lambda: docker.on("kbr0"), 120)
        docker.again(json.dumps(json.loads(docker.config.read_text()) | {"icc": False}))
        named = self._named("cleanup", "DockerIsolates")
        self._cleanup()
        assert json.loads(docker.config.read_text()) == json.loads(shut)
        self._found["cleanup"] = {**self._observe("cleanup"), **named}
        yield

    # ------------------------------------------------------------ what is done

    def _file(self, more: str = "") -> str:
        return file_of(self._docker.kind, more)

    def _surround(self) -> None:
        """Everything but the first host: the outside, and the other host with its mesh."""
        lab, other = self._lab, self._other
        netns.sysctl(lab.hub, {"net/ipv4/ip_forward": "0", "net/ipv6/conf/all/forwarding": "0"})
        # an IPv6 address that is deprecated is no source unless it is asked for
        lines = [f"addr replace {four}/24 dev hub" for four, _ in OUTSIDE.values()]
        lines += [f"addr replace {six}/64 dev hub nodad preferred_lft 0" for _, six in list(OUTSIDE.values())[1:]]
        netns.ip_batch(lines, lab.hub)
        ranges = [*SUBNETS.values(), ("172.17.0.0/16", "fd00:d0c::/64")]
        via = {4: str(self._host.address), 6: f"2001:db8::{10 + self._host.index}"}
        routes = [f"route add {r} via {via[6 if ':' in r else 4]}" for pair in ranges for r in pair]
        netns.ip_batch(routes, other.ns)
        netns.ip_batch(
            [*routes, f"route add 10.97.1.0/24 via {via[4]}", f"route add fd00:97:1::/64 via {via[6]}"], lab.hub
        )
        other.start_agent()
        lab.converged(120, [other])
        other.plug()
        self._servers.listen(lab.hub, [_OUTSIDE])

    def _create(self) -> None:
        docker = self._docker
        for name, subnets in SUBNETS.items():
            pools = [{"Subnet": subnet} for subnet in subnets]
            about = {"Name": name, "Driver": "bridge", "EnableIPv6": True, "Internal": name == "inner"}
            docker.api("POST", "/networks/create", about | {"IPAM": {"Driver": "default", "Config": pools}})
        for name, network in CONTAINERS.items():
            ports = {f"{_OPEN}/tcp": PUBLISHED[name]} if name in PUBLISHED else {}
            docker.run(name, "no" if name == "idle" else "always", network, ports)
        self._bar()
        docker.again(docker.config.read_bytes())

    def _bar(self) -> None:
        """The user's rules, on either bridge."""
        pods = [str(address) for address in self._other.pod(2).addresses]
        if self._docker.kind.nftables:
            text = ""
            for bridge in BRIDGES:
                for version, ip in enumerate(("ip", "ip6")):
                    for name in ("outside DOCKER-USER", "outside FORWARD"):
                        text += f'iifname "{bridge}" {ip} daddr {OUTSIDE[name][version]} drop\n'
                    text += f'iifname "{bridge}" {ip} daddr {pods[version]} drop\n'
                    text += f'oifname "{bridge}" {ip} saddr {OUTSIDE[GUEST][version]} drop\n'
            chain = f"chain forward {{\ntype filter hook forward priority filter - 1\n{text}}}\n"
            self._host.run(["nft", "-f", "-"], text=f"table inet user {{\n{chain}}}\n")
            return
        for version, tool in enumerate(("iptables", "ip6tables")):
            user = "DOCKER-USER"
            if not self._known(tool):
                continue
            self._host.run([tool, "-N", user], check=False)
            for bridge in BRIDGES:
                for barred in (OUTSIDE["outside DOCKER-USER"][version], pods[version]):
                    self._host.run([tool, "-I", user, "-i", bridge, "-d", barred, "-j", "DROP"])
                self._host.run([tool, "-I", user, "-o", bridge, "-s", OUTSIDE[GUEST][version], "-j", "DROP"])
                barred = OUTSIDE["outside FORWARD"][version]
                self._host.run([tool, "-I", "FORWARD", "-i", bridge, "-d", barred, "-j", "DROP"])

    @functools.cache  # noqa: B019  # one matrix a module
    def _known(self, tool: str) -> bool:
        """Whether this Docker has rules in that family: asked while it runs, and true of it after a reboot."""
        return self._host.run([tool, "-S", "DOCKER-USER"], check=False).returncode == 0

    def _replace(self) -> None:
        self._host.start_agent("--docker", "replace", *self._docker.options)
        until("Docker on kbr0", lambda: self._docker.on("kbr0"), 120)

    def _named(self, situation: str, words: str) -> dict[Probe, str]:
        """Whether status names what would keep the mesh's packets from containers; a little time is enough."""
        with contextlib.suppress(LabError):
            until("the reason", lambda: words in self._host.ovsmesh("status", "-o", "json").stdout, 30)
            return {cells.NAMED[situation]: "is named"}
        return {cells.NAMED[situation]: "is not named"}

    def _spoil(self) -> None:
        """Delete one of the agent's rules, and wait for it."""
        host = self._host
        found = [
            line for line in host.run(["iptables", "-S"]).stdout.splitlines() if "ovsmesh" in line and line[1] == "A"
        ]
        if found:
            host.run(["iptables", *shlex.split(f"-D{found[0][2:]}")])
            until("the rule again", lambda: found[0] in host.run(["iptables", "-S"]).stdout)
        self._lab.converged(120, [host], thorough=True)

    def _reboot(self, first: str) -> None:
        """Cut the power, come up again with the user's rules, and start agent and Docker; no agent without `first`."""
        docker, host = self._docker, self._host
        power_cut(docker)
        boot(docker)
        self._bar()
        host.start_ovsdb()
        host.start_vswitchd(restore_wait=bool(first))
        if first == "agent":
            host.start_agent("--docker", "replace", *docker.options)
            until("the mesh", lambda: "kbr0" in links(host))
        if first == "Docker":
            # what the drop-in of Docker's unit has systemd do
            text = docker_unit.drop_in(f"{cidr[1]}/{cidr.prefixlen}" for cidr in host.pod_cidrs)
            for command in re.findall(r"^ExecStartPre=(.+)$", text, re.MULTILINE):
                host.run(shlex.split(command))
        if not docker.alive():
            docker.start()
        if first == "Docker":
            host.start_agent("--docker", "replace", *docker.options)
        if first:
            until("Docker on kbr0", lambda: docker.on("kbr0"), 120)
            self._lab.converged(120, [host], thorough=True)

    def _cleanup(self) -> None:
        self._host.stop_agent()
        done = self._host.ovsmesh("cleanup", timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    # ------------------------------------------------------------ what is asked

    def _observe(self, situation: str = "") -> Observation:
        docker = self._docker
        kept = sorted(set(CONTAINERS) - {"idle"})
        until(f"containers {', '.join(kept)}", lambda: set(kept) <= set(docker.running()), 120)
        found = {cells.IDLE: "runs" if "idle" in docker.running() else "is stopped"}
        if found[cells.IDLE] != "runs":
            docker.begin("idle")
        wanted = cells.wanted(self._baseline[cells.SITUATIONS[situation]], situation) if situation else {}
        inside = {name: f"/proc/{docker.inspect(name)['State']['Pid']}/ns/net" for name in CONTAINERS}
        self._servers.forget()
        for ns in inside.values():
            self._servers.listen(ns, [_OPEN, _HIDDEN])
        self._servers.listen(self._host.ns, [_HOST])
        for ns in (self._other.ns, *(pod.ns for pod in self._other.pods)):
            self._servers.listen(ns, [_HIDDEN])
        self._servers.listen(self._lab.hub, [_OUTSIDE])
        addresses = self._addresses()
        labels = self._labels(addresses)
        left = list(cells.probes())
        for _ in range(_ROUNDS if wanted else 2):
            attempts = [self._attempt(probe, inside, addresses) for probe in left]
            for probe, answer in zip(left, connect(attempts, _SECONDS), strict=True):
                found[probe] = labels.get(answer, answer)
            left = [p for p in left if found[p] in FAILURES and (not wanted or wanted[p] not in (*FAILURES, found[p]))]
            if not left:
                break
        found |= self._full_size(inside, addresses) | self._settings(inside)
        if situation in ("", *cells.ON_DOCKER0):
            found |= self._left(labels)
        return found

    def _settings(self, inside: Mapping[str, str]) -> dict[Probe, str]:
        found = {Probe(STATE, name, "MTU", 0): str(_mtu(inside[name])) for name in ("web", "shop")}
        about = self._docker.inspect("web")["NetworkSettings"]["Networks"]["bridge"]
        found[Probe(STATE, "web", "range", 0)] = str(
            ip_interface(f"{about['IPAddress']}/{about['IPPrefixLen']}").network
        )
        return found

    def _addresses(self) -> dict[str, tuple[str, str]]:
        """Return the address of every place, by family."""
        host, other = self._host, self._other
        found = {
            name: (self._docker.address(name, 4, n), self._docker.address(name, 6, n)) for name, n in CONTAINERS.items()
        }
        for name, of in (("host", host), ("neighbour", other)):
            found[name] = (str(of.address), f"2001:db8::{10 + of.index}")
        one, two = ((str(pod.addresses[0]), str(pod.addresses[1])) for pod in other.pods)
        return found | OUTSIDE | {"pod": one, "pod DOCKER-USER": two}

    def _labels(self, addresses: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        """Return the name of every place by each of its addresses; a host has many."""
        found = {address: name for name, pair in addresses.items() for address in pair}
        for host, name in ((self._host, "host"), (self._other, "neighbour")):
            for link in ip_json(host, "addr", "show"):
                found |= {each["local"]: name for each in link["addr_info"]}
        return found | {"127.0.0.1": "host", "::1": "host", "unreachable": NO_ANSWER}

    def _attempt(self, probe: Probe, inside: Mapping[str, str], addresses: Mapping[str, tuple[str, str]]) -> Attempt:
        ns = {"host": self._host.ns, "neighbour": self._other.ns, "pod": self._other.pod(1).ns}
        ns |= {"outside": self._lab.hub, GUEST: self._lab.hub, **inside}
        family = 0 if probe.version == 4 else 1
        source = addresses[GUEST][family] if probe.client == GUEST else ""
        name, port = probe.target, _HIDDEN
        if name.startswith("port of "):
            port = PUBLISHED[name.split()[2]]
            address = ("127.0.0.1", "::1")[family] if name.endswith("loopback") else addresses["host"][family]
            return Attempt(ns[probe.client], address, port, source)
        port = {"host": _HOST}.get(name, _OUTSIDE if name.startswith("outside") else _HIDDEN)
        return Attempt(ns[probe.client], addresses[name][family], port, source)

    def _full_size(self, inside: Mapping[str, str], addresses: Mapping[str, tuple[str, str]]) -> dict[Probe, str]:
        """Ping with packets as big as the client's link carries, which nobody may split."""
        found = {}
        pod = self._other.pod(1).ns
        for group, client, target in ((NETWORKS, "web", "idle"), (MESH, "web", "pod"), (MESH, "pod", "web")):
            ns = pod if client == "pod" else inside[client]
            for version, header in ((4, 28), (6, 48)):
                probe = Probe(group, client, f"{target} at full size", version)
                found[probe] = _pinged(ns, addresses[target][version == 6], header)
        return found

    def _left(self, labels: Mapping[str, str]) -> dict[Probe, str]:
        """What a cleanup has to leave as Docker alone has it."""
        text = rules(self._host)
        for address, label in labels.items():
            text = re.sub(rf"(?<![\w.:]){re.escape(address)}(?![\w.])", label, text)
        found = {"rules": "\n".join(sorted(text.splitlines())), "links": str(sorted(links(self._host).items()))}
        return {Probe(STATE, "host", what, 0): text for what, text in found.items()}


def _inside(ns: str) -> list[str]:
    return ["nsenter", f"--net={ns if ns.startswith('/') else netns.NETNS / ns}"]


def _mtu(ns: str) -> int:
    argv = [*_inside(ns), "ip", "-j", "link", "show", "eth0"]
    return int(json.loads(subprocess.run(argv, capture_output=True, timeout=60, check=True).stdout)[0]["mtu"])


def _pinged(ns: str, address: str, header: int) -> str:
    """Whether the biggest packet that eth0 carries is answered."""
    ping = ["ping", "-n", "-q", "-c", "3", "-i", "0.2", "-W", "1", "-M", "do", "-s", str(_mtu(ns) - header), address]
    done = subprocess.run([*_inside(ns), *ping], capture_output=True, text=True, timeout=60, check=False)
    return NO_ANSWER if " 0 received" in done.stdout else "answers"


def file_of(kind: Kind, more: str = "") -> str:
    """Return the text of daemon.json, with what is not the same for all kinds."""
    return FILE % (more + (', "firewall-backend": "nftables"' if kind.nftables else ""))


def boot(docker: Docker) -> None:
    """Set forwarding as it is when a host comes up. With nftables Docker leaves that to the host's owner."""
    on = "1" if docker.kind.nftables else "0"
    netns.sysctl(docker.host.ns, {"net/ipv4/ip_forward": on, "net/ipv6/conf/all/forwarding": on})


def cases() -> list[ParameterSet]:
    """Return every cell as a parameter: a situation and a group."""
    every = itertools.product(cells.SITUATIONS, cells.GROUPS)
    return [pytest.param(situation, group, id=f"{situation}-{group}") for situation, group in every]


def bring(make: Callable[..., Lab], get: Callable[[], Kind]) -> Iterator[Matrix]:
    """Yield the matrix of one Docker, on a lab of its own. Skip, outside CI, where that Docker is not to be had."""
    try:
        kind = get()
    except (BinariesError, DebianError) as error:
        if os.environ.get("CI"):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    lab = make(2, 2, dual_stack=True, agents=False)
    lab.write_mesh()
    base = Path(tempfile.mkdtemp(prefix="ovsmesh-dk-", dir="/tmp"))
    docker = Docker(lab.host(1), base / "h1", kind, patience=120)
    try:
        docker.prepare()
        docker.configure(file_of(kind))
        boot(docker)
        docker.start()
        docker.load()
        matrix = Matrix(lab, docker)
        try:
            yield matrix
        finally:
            matrix.close()
    finally:
        docker.end()
        shutil.rmtree(base, ignore_errors=True)
