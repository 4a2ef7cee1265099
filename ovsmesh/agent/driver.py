"""This host: the rooms that act (ovsdb, openflow, netlink, firewall, cni) as one thing to observe and change.

The only place, with agent, that joins them. It decides nothing: what to change comes as a Plan,
and the order of its steps is kept as far as one transaction or one bundle for many steps allows.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ovsmesh.containers.cni import Cni
from ovsmesh.containers.docker import STRANGER, BridgeState, Docker, DockerObserved
from ovsmesh.dataplane import firewall_rules
from ovsmesh.dataplane.docker_config import DOCKER0
from ovsmesh.dataplane.plan import Plan, Step
from ovsmesh.dataplane.types import KBR, KINDS, OBR, Dataplane, Facts, Observed, Unmanaged
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.linux.firewall import Firewall
from ovsmesh.linux.netlink import Netlink, write_sysctl
from ovsmesh.mesh.types import Mesh, Node
from ovsmesh.ovs.idl import run_dir
from ovsmesh.ovs.openflow import FlowTable, port_of
from ovsmesh.ovs.ovsdb import Ovs
from ovsmesh.reasons import Reason

_KERNEL_TABLES = ("addresses", "neighbours", "fdb", "routes")
_DOCKER_NEEDS = ("bridges", "links", "addresses")
"""Kinds that must be in place before Docker is touched: dockerd gives a kbr0 without an address one of its own."""
_GENL_FAMILY = b"ovs_datapath"
"""Name of the kernel datapath's generic netlink family (linux/openvswitch.h)."""
OTHERS_GRACE = 5.0
"""Seconds that flow-restore-wait is left for whoever restores the flows of other bridges."""


class Driver:
    """Everything of ovsmesh on this host. Not thread-safe; one a process."""

    def __init__(self, ovsdb: str, cni_dir: str = "", cni_bin_dir: str = "", docker: Docker | None = None) -> None:
        self.docker = docker
        self.ovs = Ovs(ovsdb)
        self.net = Netlink()
        self.flows = FlowTable(run_dir(ovsdb))
        self.firewall = Firewall()
        self.cni = Cni(cni_dir, cni_bin_dir)
        self.switch_up = False
        self._waiting_since: float | None = None
        self._carriers: dict[str, bool] = {}

    def close(self) -> None:
        for room in (self.flows, self.ovs, self.net, self.firewall, self.cni):
            room.close()
        for more in self._rooms():
            more.close()

    def _rooms(self) -> tuple[Docker, ...]:
        return (self.docker,) if self.docker else ()

    def fds(self) -> list[int]:
        fds = [*self.net.fds(), *self.flows.fds(), *self.firewall.fds(), *self.cni.fds()]
        return [*fds, *(fd for room in self._rooms() for fd in room.fds())]

    def wait(self, fds: Iterable[int], timeout: float) -> None:
        """Sleeps until a bell rings, one of `fds` is readable, or `timeout` seconds are over."""
        self.ovs.wait([*self.fds(), *fds], timeout)

    def drain(self) -> bool:
        """Takes in what the bells brought; True if something of ours may have changed."""
        # each must run, so no short circuit
        rang = [self.ovs.run(), self.net.drain(), self.flows.drain(), self.firewall.drain(), self.cni.drain()]
        return any(rang + [room.drain() for room in self._rooms()])

    @property
    def busy(self) -> bool:
        """Whether something is under way here that ends by itself, and rings then."""
        return any(room.busy for room in self._rooms())

    @property
    def expecting(self) -> bool:
        """Whether something here is about to be known."""
        return any(room.expecting for room in self._rooms())

    def dirty(self) -> None:
        """Makes the next observation read the system whole instead of trusting notifications."""
        self.net.dirty()
        self.flows.dirty()
        self.firewall.resync()
        for room in self._rooms():
            room.dirty()

    def retry(self) -> None:
        """Before a turn that tries again what failed: reads all anew, and has the switch try again."""
        self.dirty()
        if self.ovs.synced and self.ovs.errors:
            with contextlib.suppress(OvsmeshError):
                # the turn that follows tells what is still wrong
                self.ovs.nudge()

    def facts(self, mesh: Mesh, me: Node, probe_firewall: bool = True) -> Facts:
        """What the desired dataplane depends on here. `probe_firewall`: see Firewall.missing."""
        self.net.watch(mesh.cluster_cidrs)
        underlay = self.net.underlay(str(me.address))
        carried = underlay is not None and self._carried(underlay[0])
        facts = Facts(
            underlay_mtu=underlay[1] if underlay else None,
            # the one that carries the tunnel address; else the kernel's where the kernel has one
            datapath_type="system" if kernel_datapath() and not carried else "netdev",
            datapath_carried=carried or not self.ovs.synced,
            ipv6=Path("/proc/sys/net/ipv6").exists(),
            ra_links=self.net.ra_links(),
            forward_drop=self.firewall.forward_drop(),
            cni=self.cni.facts(),
            docker=self.docker.wanted() if self.docker else "",
        )
        missing = self.firewall.missing(firewall_rules.rules(mesh, me, facts), probe_firewall)
        return replace(facts, firewall_missing=missing)

    def _carried(self, link: str) -> bool:
        """Whether a bridge of the userspace datapath carries the link; as last known while the database is away."""
        if self.ovs.synced:
            self._carriers[link] = self.ovs.bridge_of(link) == "netdev"
        return self._carriers.get(link, False)

    def observe(self, want: Dataplane) -> Observed:
        """Reads back all that is ours, and what stands in its way; `want` says which sysctls matter."""
        conflists, unplugged, problems = self.cni.observe()
        kernel, unmanaged = self.net.observe(want.sysctls, plugged=bool(conflists))
        unmanaged += unplugged
        unknown: set[str] = set()
        rules, peers, filter_problems = self.firewall.observe(want.rules)
        problems += filter_problems
        bridges: dict[str, Any] = {}
        ports: dict[str, Any] = {}
        restore: dict[str, bool] = {}
        flows: dict[str, str] = {}
        if self.ovs.synced:
            bridges, ports, restore, ovs_unmanaged, ovs_problems = self.ovs.observe()
            unmanaged += ovs_unmanaged
            problems += ovs_problems
            found = self._flows(problems) if bridges else ({}, ())
            self.switch_up = found is not None
            if self._leave_waiting(bool(restore)):
                unknown.add("restore_wait")
            if found is None:
                unknown.add("flows")
                text = f"ovs-vswitchd does not answer on {OBR}, so its flows can't be kept; is it running?"
                problems.append(Problem(Reason.SwitchDown, text))
            else:
                flows = found[0]
                unmanaged += found[1]
        else:
            # a switch without its database may not answer, so what is known of its flows has to do
            found = self._flows(problems) if self.ovs.ofports and self.flows.known else None
            self.switch_up = found is not None
            flows = found[0] if found else {}
            unknown |= {"bridges", "ports", "restore_wait"} | (set() if found else {"flows"})
            text = f"ovsdb-server does not answer at {self.ovs.remote}, so ports can't be kept; is it running?"
            problems.append(Problem(Reason.DatabaseDown, text))
        docker = self.docker.observe(want, self._about_bridges()) if self.docker else DockerObserved()
        unmanaged += docker.unmanaged
        problems += docker.problems
        unknown |= set() if docker.known else {"docker"}
        have = Dataplane(
            bridges=bridges,
            links=kernel["links"],
            sysctls=kernel["sysctls"],
            addresses=kernel["addresses"],
            rules=rules,
            filter_peers=dict(peers),
            ports=ports,
            flows=flows,
            neighbours=kernel["neighbours"],
            fdb=kernel["fdb"],
            routes=kernel["routes"],
            restore_wait=restore,
            docker=docker.settings,
            cni=conflists,
        )
        relevant = tuple(_relevant(unmanaged, want))
        return Observed(have, relevant, tuple(problems), frozenset(unknown), docker.note)

    def _about_bridges(self) -> BridgeState:
        return BridgeState(
            self.net.mirror.index(KBR) or 0, self.net.mirror.bridge_ports(DOCKER0), self.net.mirror.addresses_of(KBR)
        )

    @property
    def switch_lost(self) -> bool:
        """Whether the database has a bridge of ours, and no switch answers on it."""
        return self.ovs.synced and not self.switch_up

    def switch_answers(self) -> bool:
        return self.flows.answers()

    def _leave_waiting(self, waiting: bool) -> bool:
        """Whether flow-restore-wait is to stay for now: the switch is not up yet, or others' flows are not back.

        Never for longer than the grace: a switch that waits for ever forwards nothing new.
        """
        if not waiting:
            self._waiting_since = None
            return False
        self._waiting_since = self._waiting_since or time.monotonic()
        return (not self.switch_up or self.ovs.others_restore()) and not self._waited()

    def _waited(self) -> bool:
        return self._waiting_since is not None and time.monotonic() - self._waiting_since >= OTHERS_GRACE

    def _flows(self, problems: list[Problem]) -> tuple[dict[str, str], tuple[Unmanaged, ...]] | None:
        try:
            return self.flows.observe(self.ovs.ofports)
        except OvsmeshError as error:
            problems.append(Problem(Reason.SwitchUnseen, str(error)))
            return None

    def apply(self, todo: Plan, want: Dataplane) -> list[Problem]:
        """Carries a plan out, and returns what could not be done; one part's failure stops no other."""
        groups: dict[tuple[str, str], list[Step]] = {(op, kind): [] for op in "+-" for kind in KINDS}
        for step in todo.steps:
            groups["-" if step.op == "-" else "+", step.kind].append(step)
        problems: list[Problem] = []

        def attempt(what: str, call: Callable[..., None], *args: Any) -> bool:
            try:
                call(*args)
            except OvsmeshError as error:
                problems.append(Problem(Reason.ApplyFailed, f"{what}: {error}"))
                return False
            return True

        def links(name: str) -> bool:
            """Whether the link is there."""
            there = True
            for step in groups["+", "links"]:
                if step.key == name:
                    done = attempt(f"link {name}", self.net.set_link, step.key, step.want, step.have)
                    there = done or step.op != "+"
            return there

        def filter_rules() -> None:
            held = {s.key: s.have for s in todo.held if s.kind == "filter_peers"}
            self.firewall.apply(want.rules, {**held, **want.filter_peers})

        def removals() -> None:
            gone = [s.key for s in groups["-", "flows"]]
            if gone and not bridge_gone:
                attempt("flows", self._set_flows, {}, gone)
            if not filter_first and (groups["-", "rules"] or groups["-", "filter_peers"]):
                filter_rules()

        if groups["-", "cni"]:
            # first of all, so that no pod comes to what is going
            attempt("CNI", self.cni.apply, groups["-", "cni"])
        bridge_gone = bool(groups["-", "bridges"])
        filter_first = bool(groups["+", "rules"] or groups["+", "filter_peers"])
        kbr = links(KBR)
        late = self._set_ports(groups, attempt, filter_rules if filter_first else lambda: None)
        adds = {s.key: s.want for s in groups["+", "flows"]}
        restored = not adds or attempt("flows", self._set_flows, adds, [])
        links(OBR)
        for step in groups["+", "sysctls"]:
            attempt(f"sysctl {step.key}", write_sysctl, step.key, step.want)
        if kbr:
            # else whatever has the name meanwhile is not ours as yet
            problems += self._kernel(groups)
        clear = bool(groups["-", "restore_wait"]) and (restored or self._waited())
        if late or bridge_gone or clear:
            # while the switch closes ports, what leads to them goes too: neither waits for the other
            attempt("ports", self.ovs.apply, None, {}, late, bridge_gone, clear, removals)
        else:
            removals()
        for step in groups["-", "links"]:
            # obr0 goes with its bridge; without one it is what a switch that died has left
            if step.key != OBR or not bridge_gone:
                attempt(f"link {step.key}", self.net.del_link, step.key)
        if groups["+", "cni"]:
            attempt("CNI", self.cni.apply, groups["+", "cni"])
        if self.docker and not any(groups["+", kind] for kind in _DOCKER_NEEDS):
            steps = [*groups["+", "docker"], *groups["-", "docker"]]
            for step in steps:
                if step.key.startswith(STRANGER):
                    self.net.batch([(step, self.net.message("-", "addresses", step.key.removeprefix(STRANGER), KBR))])
            if steps and attempt("docker", self.docker.apply, steps, want) and not self.docker.busy:
                for step in steps:
                    if step.key == DOCKER0:
                        attempt(f"link {DOCKER0}", self.net.del_link, DOCKER0)
        return problems

    def _set_ports(
        self,
        groups: dict[tuple[str, str], list[Step]],
        attempt: Callable[..., bool],
        meanwhile: Callable[[], None],
    ) -> list[str]:
        """Bridge and ports in one transaction; returns the ports to delete later, when nothing uses them.

        `meanwhile` is done in any case, while the switch is busy if it is.

        A port whose place (remote and key) a new one takes goes in the same transaction: two of
        one configuration can't be, and in two transactions packets are lost (490 measured).
        """
        bridge = next((s.want for s in groups["+", "bridges"]), None)
        ports = {s.key: s.want for s in groups["+", "ports"]}
        places = {(p.remote, p.key) for p in ports.values()}
        gone = groups["-", "ports"]
        now = [s.key for s in gone if (s.have.remote, s.have.key) in places]
        if bridge is not None or ports:
            attempt("ports", lambda: self.ovs.apply(bridge, ports, now, meanwhile=meanwhile))
        else:
            meanwhile()
        return [s.key for s in gone if s.key not in set(now)]

    def _set_flows(self, add: dict[str, str], delete: list[str]) -> None:
        """One bundle; a port that the switch could not make holds back its own flows only."""
        known = self.ovs.ofports
        ready = {key: actions for key, actions in add.items() if port_of(key, actions) in known}
        self.flows.apply(ready, delete, known)
        waiting = sorted({port_of(key, actions) for key, actions in add.items() if key not in ready})
        if waiting:
            why = self.ovs.errors.get(waiting[0], "it gave it no OpenFlow number")
            raise OvsmeshError(f"{len(waiting)} ports that ovs-vswitchd could not make, the first {waiting[0]}: {why}")

    def _kernel(self, groups: dict[tuple[str, str], list[Step]]) -> list[Problem]:
        steps = [s for kind in _KERNEL_TABLES for s in groups["+", kind]]
        steps += [s for kind in reversed(_KERNEL_TABLES) for s in groups["-", kind]]
        if not steps:
            return []
        labelled = []
        for step in steps:
            value = step.have if step.op == "-" else step.want
            labelled.append((step, self.net.message(step.op, step.kind, step.key, value)))
        try:
            refused = self.net.batch(labelled)
        except OSError as error:
            return [Problem(Reason.ApplyFailed, f"kernel tables: {error.strerror or error}")]
        self.net.drain()
        return [Problem(Reason.ApplyFailed, f"{step}: {text}") for step, text in refused.items()]


def _relevant(unmanaged: list[Unmanaged], want: Dataplane) -> list[Unmanaged]:
    """Leaves out obr0's link while its bridge is unmanaged too: one thing, named once."""
    bridges = {f.key for f in unmanaged if f.kind == "bridges"}
    return [f for f in unmanaged if not (f.kind == "links" and f.key in bridges)]


def kernel_datapath() -> bool:
    """Whether this kernel has Open vSwitch's datapath; asking loads the module where there is one."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 16) as asker:
        asker.settimeout(5.0)
        asker.bind((0, 0))
        name = _GENL_FAMILY + b"\0"
        attribute = struct.pack("=HH", 4 + len(name), 2) + name + b"\0" * (-len(name) % 4)
        body = struct.pack("=BBH", 3, 1, 0) + attribute
        asker.send(struct.pack("=IHHII", 16 + len(body), 16, 1, 1, 0) + body)
        reply = asker.recv(8192)
    kind = struct.unpack_from("=H", reply, 4)[0]
    return kind != 2 or -struct.unpack_from("=i", reply, 16)[0] not in (errno.ENOENT, errno.EOPNOTSUPP)
