"""The drivers of this host (OVSDB, OpenFlow, netlink, packet filter, CNI, Docker) as one: facts, observe, wait, apply.

It decides nothing: what to change comes as a Plan.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from ovsmesh.agent.apply import Apply
from ovsmesh.containers.cni import Cni
from ovsmesh.containers.docker import BridgeState, Docker, DockerObserved
from ovsmesh.containers.forwarding import FORWARDING, Device, configured
from ovsmesh.dataplane import desired, firewall_rules
from ovsmesh.dataplane.docker_config import DOCKER0
from ovsmesh.dataplane.plan import Plan
from ovsmesh.dataplane.types import KBR, OBR, TUNNEL_LINKS, Dataplane, Detour, Facts, Observed, Unmanaged
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.linux.firewall import Firewall
from ovsmesh.linux.kernel import PodRoutes, kernel_datapath, xfrm_policies
from ovsmesh.linux.netlink import Netlink
from ovsmesh.linux.nft_monitor import FilterWatch
from ovsmesh.linux.ruleset import Query
from ovsmesh.linux.ruleset import look as look_at_filters
from ovsmesh.mesh.types import Mesh, Node
from ovsmesh.ovs.datapath import port_types
from ovsmesh.ovs.figures import SwitchReader
from ovsmesh.ovs.idl import run_dir
from ovsmesh.ovs.openflow import FlowTable
from ovsmesh.ovs.ovsdb import Ovs, OvsObserved
from ovsmesh.reasons import Reason
from ovsmesh.sysctl import Sysctls, read_sysctls

NOTHING_PROBED: Mapping[str, int | None] = MappingProxyType({})
_NEVER = float("inf")
OTHERS_GRACE = 5.0
"""Seconds that flow-restore-wait is left for whoever restores the flows of other bridges."""


class Driver:
    """All that ovsmesh reads and changes on this host. Not thread-safe; one a process."""

    def __init__(
        self,
        ovsdb: str,
        cni_dir: str = "",
        cni_bin_dir: str = "",
        docker: Docker | None = None,
        acting: bool = False,
        found_off: Iterable[int] = (),
    ) -> None:
        """`acting`: it is an agent's, so that what takes long is done beside its loop. `found_off`: see StateDir."""
        self.ovs = Ovs(ovsdb)
        self.figures = SwitchReader(ovsdb)
        """The only part of it that any thread may use."""
        self.net = Netlink()
        self.flows = FlowTable(run_dir(ovsdb))
        self.firewall = Firewall()
        self.cni = Cni(cni_dir, cni_bin_dir)
        self.docker = docker
        self._sysctls = Sysctls()
        self._filters = FilterWatch(look_at_filters) if acting else None
        self._switch_up = False
        self._look_closer = True
        """Ask the switch for its datapath's ports at the next observation."""
        self._restore_since: float | None = None
        self._pod_routes = PodRoutes()
        self._ipsec = False
        """Whether the kernel had IPsec policies when the whole system was read last."""
        self._detours: tuple[object, tuple[Detour, ...]] = (None, ())
        """What the ways to the peers were looked up for, and which of them are wrong."""
        self._joined: tuple[object, tuple[Node, ...]] = (None, ())
        """What the peers were computed for that this node joins, and those."""
        self._reached: tuple[Mesh, str] | None = None
        """The mesh, and the node in it, to whose peers the ways are followed."""
        self._found_off = set(found_off)
        """IP versions whose forwarding nobody had on before the agent, see StateDir.found_off."""
        self._found_on: set[int] = set()
        self._configured: dict[str, bool] = {}
        """Sysctl → whether a file of sysctl.d sets it: its owner wants forwarding, and has it at the next boot."""
        self._userspace: dict[str, bool] = {}
        """Link → whether a bridge of the userspace datapath carries it, as last seen."""

    def connect(self) -> None:
        """Wait for the database, for three seconds at most. Without it, the next observation says that it is down."""
        self.ovs.connect()

    def close(self) -> None:
        """Close all drivers; what they made stays."""
        for driver in (self.flows, self.ovs, self.net, self.firewall, self.cni, self._pod_routes, self._sysctls):
            driver.close()
        if self.docker:
            self.docker.close()
        if self._filters:
            self._filters.close()

    # waiting

    def wait(
        self, fds: Iterable[int], timeout: float, look: Callable[[], bool] = lambda: False, every: float = _NEVER
    ) -> None:
        """Sleep until an event source or one of `fds` is readable, or `timeout` seconds are over.

        `look` is called in between, `every` so many seconds, and ends the sleep where it returns True.
        """
        own = [*self.net.fds(), *self.flows.fds(), *self.firewall.fds(), *self.cni.fds()]
        own += [self._filters.fd] if self._filters else []
        self.ovs.wait([*own, *(self.docker.fds() if self.docker else ()), *fds], timeout, look, every)

    def drain(self) -> bool:
        """Read all event sources. Return whether something managed may have changed."""
        # each must run, so no short circuit
        woken = [self.ovs.run(), self.net.drain(), self.flows.drain(), self.firewall.drain(), self.cni.drain()]
        if self._filters:
            self._filters.changed(self.firewall.others)
            woken.append(self._filters.drain())
        return any([*woken, self.docker.drain() if self.docker else False])

    @property
    def busy(self) -> bool:
        """Whether something runs here that ends by itself, with an event."""
        return self.docker is not None and self.docker.busy

    @property
    def expecting(self) -> bool:
        """Whether something here is about to be known."""
        return self.docker is not None and self.docker.expecting

    def dirty(self) -> None:
        """Have the next observation read the whole system instead of trusting notifications."""
        self._look_closer = True
        self._detours = (None, ())
        self._configured.clear()
        self.net.dirty()
        self.flows.dirty()
        self.firewall.resync()
        self.cni.dirty()
        if self.docker:
            self.docker.dirty()

    def retry(self) -> None:
        """Prepare another attempt at what failed: read the whole system, and have the switch try again."""
        self.dirty()
        if self.ovs.synced and self.ovs.errors:
            with contextlib.suppress(OvsmeshError):
                # the next reconcile says what is still wrong
                self.ovs.nudge()

    # facts

    def facts(
        self, mesh: Mesh, node: str, probe_firewall: bool = True, path_mtus: Mapping[str, int | None] = NOTHING_PROBED
    ) -> Facts:
        """Return what the desired dataplane of `node` depends on here. `probe_firewall`: see Firewall.missing.

        `path_mtus` is what the probes know, see Prober.path_mtus.
        """
        me = mesh.node(node)
        if me is None:
            return Facts()
        self.net.watch(mesh.cluster_cidrs)
        if self._reached is None or self._reached[0] is not mesh or self._reached[1] != node:
            family = me.address.version
            self.net.reach(me.address, [n.address for n in mesh.nodes if n is not me and n.address.version == family])
            self._reached = mesh, node
        holders = self.net.holders(me.address)
        carried = bool(holders) and any(map(self._carried, (*holders, *self.net.underlay_links())))
        mtu, complete = self.net.underlay_mtu(me.address) if holders else (None, False)
        facts = Facts(
            tunnel_address=bool(holders),
            underlay_mtu=mtu,
            kept_mtu=None if complete else self._present_mtu(),
            path_mtus=self._path_mtus(mesh, path_mtus),
            # the datapath that carries the tunnel address; else the kernel's, if the kernel has one
            datapath_type="system" if kernel_datapath() and not carried else "netdev",
            datapath_carried=carried or not self.ovs.synced,
            ipv6=Path("/proc/sys/net/ipv6").exists(),
            ra_links=self.net.ra_links(),
            forward_drop=self.firewall.forward_drop(),
            exits=tuple(sorted({*self.net.exits(), *holders} - {"lo"})),
            service=os.environ.get("KUBERNETES_SERVICE_HOST", ""),
            bridges=self.net.cache.bridges(),
            forward_limited=self._forward_limited({cidr.version for cidr in me.pod_cidrs}),
            forward_nft=self.firewall.forward_nft,
            cni=self.cni.facts(),
            docker=self.docker.wanted() if self.docker else "",
        )
        if not probe_firewall:
            self.net.limit_learning()
        missing = self.firewall.missing(partial(firewall_rules.rules, mesh, me, facts), probe_firewall)
        ports: Iterable[str] = ()
        if "ibrname" in missing:
            # only an agent tells the ports: nothing is amiss where none runs. A kbr0 that is gone gets its ports back
            told = sorted(self.firewall.told(firewall_rules.PORTS))
            ports = told if probe_firewall or self.net.cache.index(KBR) is None else self.pods()
        self.net.watch_ports("ibrname" in missing)
        return replace(facts, firewall_missing=missing, pod_ports=tuple(ports))

    def _path_mtus(self, mesh: Mesh, probed: Mapping[str, int | None]) -> Mapping[str, int]:
        """Return what the ways to peers carry, where it is not full size: as probed or, where nothing is, as routed."""
        found = {name: mtu for name, mtu in probed.items() if mtu is not None}
        routed = self.net.small_routes()
        for peer in mesh.nodes if routed else ():
            mtus = [routed[cidr] for cidr in map(str, peer.pod_cidrs) if cidr in routed]
            if mtus and peer.name not in probed:
                found[peer.name] = min(mtus)
        return found

    def _present_mtu(self) -> int | None:
        """Return the MTU of pods that is in place: kbr0's or, after a reboot, what the database has for obr0."""
        kbr = self.net.cache.managed_links()[0].get(KBR)
        bridge = self.ovs.observe().bridges.get(OBR) if kbr is None and self.ovs.synced else None
        return kbr.mtu if kbr else bridge.mtu_request or None if bridge else None

    def _forward_limited(self, versions: Iterable[int]) -> tuple[int, ...]:
        """Return those of these IP versions that this host would not forward without the agent."""
        self._found_off |= self.firewall.forward_limited()
        limited = []
        for key, version in FORWARDING.items():
            if version not in versions:
                continue
            if version not in self._found_off | self._found_on and (value := read_sysctls([key]).get(key)):
                (self._found_off if value == "0" else self._found_on).add(version)
            if version in self._found_off and not (version == 6 and self.firewall.open_ipv6(self._others_with_ipv6())):
                if key not in self._configured:
                    self._configured[key] = bool(configured(key, "1"))
                limited += [] if self._configured[key] else [version]
        return tuple(limited)

    def _others_with_ipv6(self) -> list[str]:
        """Return the bridges of others that have a range of IPv6. Docker turns forwarding on for each such network."""
        cache, exits = self.net.cache, self.net.exits()
        return [
            name
            for name in cache.bridges()
            if name not in exits and any(":" in a and not a.startswith("fe80:") for a in cache.addresses_of(name))
        ]

    def _carried(self, link: str) -> bool:
        """Return whether a bridge of the userspace datapath carries the link, or did when the database was last up."""
        if self.ovs.synced:
            self._userspace[link] = self.ovs.bridge_of(link) == "netdev"
        return self._userspace.get(link, False)

    @property
    def database_up(self) -> bool:
        """Whether the database has answered, and the connection stands."""
        return self.ovs.synced

    @property
    def switch_lost(self) -> bool:
        """Whether the database has a managed bridge, and no switch answers on it."""
        return self.ovs.synced and not self._switch_up

    def switch_answers(self) -> bool:
        """Return whether ovs-vswitchd answers on obr0."""
        return self.flows.answers()

    def pods(self) -> list[str]:
        """Return the ports of kbr0 but obr0."""
        return [name for name in self.net.cache.ports_of(KBR) if name != OBR]

    def devices(self) -> list[Device]:
        """Return the network devices of this host, but taps: those carry frames, as a bridge of Open vSwitch does."""
        self.net.observe()
        cache = self.net.cache
        return [
            Device(link.name, link.kind, link.up, cache.addresses_of(link.name), cache.bridge_ports(link.name) or ())
            for link in cache.links.values()
            if not (link.kind == "tun" and link.mac)
        ]

    def sysctls(self, want: Dataplane) -> dict[str, str]:
        """Return the present values of the desired sysctls."""
        return self._sysctls.read(want.sysctls)

    def detours(self, mesh: Mesh, node: str, facts: Facts) -> tuple[Detour, ...]:
        """Return the ways to peers' pods that do not go through kbr0, as the kernel says.

        It is asked again when a rule or a route of others has changed. `observe` must have been called before.
        """
        me, bridge, cache = mesh.node(node), self.net.cache.index(KBR), self.net.cache
        if me is None or bridge is None:
            return ()
        rules = self._pod_routes.rules()
        state = (mesh, bridge, rules, cache.routing, facts)
        if self._detours[0] is None:
            self._ipsec = bool(xfrm_policies())
        elif self._detours[0] == state:
            return self._detours[1]
        found: tuple[Detour, ...] = ()
        narrower = cache.narrower_routes()
        if rules or self._ipsec or narrower:
            gateways, peers = desired.gateways(me, facts), self._peers(mesh, me, facts)
            found = self._pod_routes.detours(bridge, gateways, peers, mesh.cluster_cidrs, narrower)
        self._detours = (state, found)
        return found

    def _peers(self, mesh: Mesh, me: Node, facts: Facts) -> tuple[Node, ...]:
        """Return the peers that this node joins. They are computed once for a mesh and facts: 2 ms for a thousand."""
        if self._joined[0] != (mesh, me, facts):
            joined = desired.peers(mesh, me, desired.wiring(mesh, me, facts))[0]
            self._joined = (mesh, me, facts), tuple(peer for peer in mesh.nodes if peer.name in joined)
        return self._joined[1]

    def refusals(self, mesh: Mesh, node: str, facts: Facts) -> tuple[Problem, ...]:
        """Return what in the packet filter of this host drops packets of the mesh; for an agent, when last looked."""
        me = mesh.node(node)
        if me is None or "nft" in facts.firewall_missing:
            return ()
        peers = tuple((peer.name, peer.address, peer.pod_cidrs) for peer in self._peers(mesh, me, facts))
        families = desired.wiring(mesh, me, facts).families
        own = tuple(cidr for cidr in me.pod_cidrs if cidr.version in families)
        underlay = self.net.underlay_links()
        tunnel = None
        if underlay and facts.datapath_type == "system":
            port = firewall_rules.UDP_PORTS.get(mesh.encapsulation, 0)
            tunnel = ("udp" if port else "gre", port, underlay[0], me.address)
        query = Query(own, peers, mesh.cluster_cidrs, tunnel)
        if self._filters is None:
            return look_at_filters(query)
        self._filters.want(query, self.firewall.others)
        return self._filters.problems

    def who(self, drift: Plan) -> str:
        """Return the processes that caused drift, as far as the kernel has told and they are still there; else "".

        To be called once a reconcile: what was told before the last call is about earlier changes.
        """
        found = self.net.who((step.kind, step.key) for step in drift.steps)
        writer, self.firewall.changed_by = self.firewall.changed_by, ""
        if writer and any(step.kind in ("rules", "filter_peers") for step in drift.steps):
            found.add(writer)
        return "; ".join(sorted(found))

    # observing and applying

    def observe(self, want: Dataplane) -> Observed:
        """Read back all that is managed, and what conflicts with it. `want` says which sysctls matter."""
        conflists, cni_unmanaged, cni_problems = self.cni.observe()
        kernel, kernel_unmanaged = self.net.observe(cni=bool(conflists))
        rules, peers, filter_problems = self.firewall.observe(want.rules)
        switch, flows, unknown = self._observe_switch()
        docker = self.docker.observe(want, self._bridge_state()) if self.docker else DockerObserved()
        have = Dataplane(
            bridges=switch.bridges,
            links=kernel["links"],
            sysctls=self._sysctls.read(want.sysctls),
            addresses=kernel["addresses"],
            rules=rules,
            filter_peers=dict(peers),
            ports=switch.ports,
            flows=flows,
            neighbours=kernel["neighbours"],
            fdb=kernel["fdb"],
            routes=kernel["routes"],
            restore_wait=switch.restore_wait,
            docker=docker.settings,
            cni=conflists,
        )
        bridges = {f.key for f in switch.unmanaged if f.kind == "bridges"}
        # the link of an unmanaged obr0 is the same thing
        links = [f for f in kernel_unmanaged if f.kind != "links" or f.key not in bridges]
        return Observed(
            have,
            (*links, *cni_unmanaged, *switch.unmanaged, *docker.unmanaged),
            (*cni_problems, *self.net.problems(), *filter_problems, *switch.problems, *docker.problems),
            unknown | (frozenset() if docker.known else {"docker"}),
            docker.note,
        )

    def _observe_switch(self) -> tuple[OvsObserved, dict[str, str], frozenset[str]]:
        """Return what the database holds, the flows, and which kinds are unknown."""
        problems: list[Problem] = []
        if not self.ovs.synced:
            # a switch without its database may not answer: what is known of its flows has to do
            found = self._observe_flows(problems) if self.ovs.ofports and self.flows.known else None
            self._switch_up = found is not None
            text = f"ovsdb-server does not answer at {self.ovs.remote}, so ports can't be kept; is it running?"
            problems.append(Problem(Reason.DatabaseDown, text))
            unknown = frozenset({"bridges", "ports", "restore_wait"} | (set() if found else {"flows"}))
            return OvsObserved({}, {}, {}, [], problems), found[0] if found else {}, unknown
        database = self.ovs.observe()
        found = self._observe_flows(problems) if database.bridges else ({}, ())
        self._switch_up = found is not None
        unknown = frozenset({"restore_wait"} if self._restore_pending(bool(database.restore_wait)) else ())
        if found is None:
            text = f"ovs-vswitchd does not answer on {OBR}, so its flows can't be kept; is it running?"
            problems.append(Problem(Reason.SwitchDown, text))
            found, unknown = ({}, ()), unknown | {"flows"}
        elif database.bridges and not self._devices(database):
            database = database._replace(
                bridges={n: b._replace(devices_lost=True) for n, b in database.bridges.items()}
            )
        unmanaged = [*database.unmanaged, *found[1]]
        return database._replace(unmanaged=unmanaged, problems=[*database.problems, *problems]), found[0], unknown

    def _observe_flows(self, problems: list[Problem]) -> tuple[dict[str, str], tuple[Unmanaged, ...]] | None:
        try:
            return self.flows.observe(self.ovs.ofports)
        except OvsmeshError as error:
            problems.append(Problem(Reason.SwitchUnseen, str(error)))
            return None

    def _devices(self, database: OvsObserved) -> bool:
        """Return whether a switch that answers still has obr0's link and, with tunnels, its datapath's port for them.

        It does not make them again when someone deletes, renames or moves them. The userspace datapath's port is no
        link, so that its end shows only when everything is read again.
        """
        if not self.net.present(OBR):
            return False
        kinds = {port.type.split()[0] for name, port in database.ports.items() if name in self.ovs.ofports}
        kernel = any(bridge.datapath_type == "system" for bridge in database.bridges.values())
        gone = kernel and any(not self.net.present(TUNNEL_LINKS[kind]) for kind in kinds & TUNNEL_LINKS.keys())
        if not (gone or self._look_closer):
            return True
        # a kernel may call the link by another name: the switch has the last word
        self._look_closer = False
        there = port_types(run_dir(self.ovs.remote))
        return there is None or all({kind, f"ip6{kind}"} & there for kind in kinds & TUNNEL_LINKS.keys())

    def _bridge_state(self) -> BridgeState:
        cache = self.net.cache
        return BridgeState(cache.index(KBR) or 0, cache.bridge_ports(DOCKER0), cache.addresses_of(KBR))

    def _restore_pending(self, waiting: bool) -> bool:
        """Return whether flow-restore-wait must stay: the switch is not up, or the flows of others are not back.

        It never stays longer than OTHERS_GRACE: a switch that waits forwards nothing new.
        """
        if not waiting:
            self._restore_since = None
            return False
        self._restore_since = self._restore_since or time.monotonic()
        return (not self._switch_up or self.ovs.others_restore()) and not self.restore_overdue()

    def restore_overdue(self) -> bool:
        """Return whether flow-restore-wait has been set for longer than OTHERS_GRACE."""
        return self._restore_since is not None and time.monotonic() - self._restore_since >= OTHERS_GRACE

    def apply(self, todo: Plan, want: Dataplane) -> list[Problem]:
        """Carry a plan out, and return what could not be done."""
        return Apply(self, todo, want).run()
