"""Collect the evidence of a trace on this host: what is there, beside what is wanted, and what packets do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ovsmesh.dataplane import desired
from ovsmesh.dataplane.plan import Step
from ovsmesh.dataplane.types import COOKIE, KBR, OBR, Dataplane
from ovsmesh.errors import OvsmeshError, summary
from ovsmesh.linux.kernel import Kernel
from ovsmesh.linux.nft_trace import encapsulation
from ovsmesh.linux.ruleset import Query, remedied
from ovsmesh.mesh.types import IPAddress, Mesh, Node, gateway
from ovsmesh.ovs.idl import run_dir
from ovsmesh.ovs.switch_view import SwitchView
from ovsmesh.probe.peer_agent import ask_agent
from ovsmesh.probe.targets import targets
from ovsmesh.text import printable
from ovsmesh.trace import netns
from ovsmesh.trace.packets import From, Packets, Sent, Way
from ovsmesh.trace.types import (
    EchoFound,
    Evidence,
    Kind,
    LinkFound,
    PeerFound,
    Place,
    PodFound,
    Point,
    RouteFound,
    Switch,
)

if TYPE_CHECKING:
    from ovsmesh.agent.driver import Driver
    from ovsmesh.agent.result import ReconcileResult

_SETTLE = 2.5
"""Seconds until the switch has added the packets of its datapath to its flows' counters."""


def prepare(
    driver: Driver, found: ReconcileResult, name: str, ovsdb: str, source: Place, target: Place, agent_runs: bool
) -> Collector:
    """Return what collects the evidence of a trace from `source`, on this node, to `target`.

    `found` is a look at this node, which has this `name`; `ovsdb` is the socket of its switch. Raises OvsmeshError
    where the system can't be read.
    """
    if found.mesh is None or found.facts is None or found.want is None or found.have is None:
        raise OvsmeshError(summary(found.problems) or f"node {name} is not in the mesh")
    mesh, me = found.mesh, found.mesh.node(name)
    if me is None:
        raise OvsmeshError(f"node {name} is not in the mesh; set --node")
    wiring = desired.wiring(mesh, me, found.facts)
    peer = None if target.node == me.name else mesh.node(target.node)
    joined = desired.peers(mesh, me, wiring)[0]
    if peer is not None and peer.name not in joined:
        why = "; ".join(str(p) for p in found.problems if p.node == peer.name) or "it can't be joined"
        raise OvsmeshError(f"node {peer.name}, where {target} is, is not joined: {why}")
    phys = _physical(driver, found, me)
    form = encapsulation(mesh.encapsulation, mesh.key is not None, me.address.version) if peer else None
    parts = joined[peer.name] if peer else Dataplane()
    way = Way(source, target, me, peer, wiring.mtu, form, phys, frozenset())
    switch = SwitchView(run_dir(ovsdb), dict(driver.ovs.ofports))
    errors = dict(driver.ovs.errors) if driver.ovs.synced else {}
    return Collector(way, mesh, found, found.want, parts, switch, errors, agent_runs)


def _physical(driver: Driver, found: ReconcileResult, me: Node) -> tuple[str, ...]:
    """Return the links that tunnel packets pass: behind a bridge of the userspace datapath, its other ports."""
    name = next(iter(driver.net.holders(me.address)), "")
    if not name:
        return ()
    if found.facts is not None and found.facts.datapath_type == "netdev":
        return tuple(port for port in driver.ovs.ports_of(name) if port != name) if driver.ovs.synced else ()
    return (name,)


class Collector:
    """Sends the packets of one trace and looks at everything that they meet."""

    def __init__(
        self,
        way: Way,
        mesh: Mesh,
        found: ReconcileResult,
        want: Dataplane,
        parts: Dataplane,
        switch: SwitchView,
        errors: Mapping[str, str],
        agent_runs: bool,
    ) -> None:
        """`parts`: what exists because of the peer. `errors`: port → why ovs-vswitchd could not make it."""
        self._mesh, self._found, self._switch, self._errors = mesh, found, switch, errors
        self._want, self._parts, self._agent_runs = want, parts, agent_runs
        self._kernel = Kernel()
        self._links = self._kernel.links()
        self._s = replace(way, own=frozenset(self._kernel.addresses()))

    def evidence(self) -> Evidence:
        """Send the packets and return all that was found. Raises OvsmeshError where none can be sent at all."""
        try:
            with netns.known(self._kernel.netlink) as spaces:
                return self._evidence(spaces)
        finally:
            self._kernel.close()

    # what is there

    def _pod(
        self, spaces: Mapping[int, tuple[int, str]], place: Place, other: IPAddress
    ) -> tuple[PodFound, int] | None:
        """Return the pod that has an address, and the descriptor of its namespace; None where none is found."""
        ports = sorted(self._links.values(), key=lambda link: link.master != KBR)
        tried: set[int] = set()
        found: tuple[PodFound, int] | None = None
        for port in ports:
            if port.namespace is None or port.namespace not in spaces or port.namespace in tried:
                continue
            if found and port.master != KBR:
                break
            tried.add(port.namespace)
            fd, how = spaces[port.namespace]
            with contextlib.suppress(OSError):
                view = netns.within(fd, lambda: _inside(place.address, other))
                if view is None:
                    continue
                if found:
                    found = replace(found[0], others=(*found[0].others, port.name)), found[1]
                    continue
                link, inside = view
                plugged = [p for p in ports if p.namespace == port.namespace and p.number == link.peer_index]
                found = replace(inside, where=how, port=plugged[0] if plugged else None), fd
        return found

    def _blind(self, spaces: Mapping[int, tuple[int, str]]) -> int:
        ports = [link for link in self._links.values() if link.master == KBR and link.name != OBR]
        return sum(port.namespace not in spaces for port in ports)

    def _missing(self) -> dict[str, tuple[str, ...]]:
        """Return, by kind, what this way needs and is not as wanted."""
        have = self._found.have
        assert have is not None
        lines: dict[str, list[str]] = {}
        needed = [(kind, getattr(self._parts, kind)) for kind in ("ports", "flows", "neighbours", "fdb", "routes")]
        needed += [(kind, getattr(self._want, kind)) for kind in ("bridges", "links", "sysctls", "addresses")]
        needed.append(("flows", {key: value for key, value in self._want.flows.items() if key == "0 "}))
        unmanaged = {(u.kind, u.key): u.detail for u in have.unmanaged if u.blocks}
        for kind, parts in needed:
            if kind in have.unknown or (kind == "flows" and self._s.peer is None):
                continue
            for key, value in parts.items():
                old = getattr(have.dataplane, kind).get(key)
                if old == value or not self._concerns(kind, key):
                    continue
                line = str(Step("+" if old is None else "~", kind, key, value, old))[2:]
                hit = unmanaged.get((kind, key)) or (unmanaged.get((kind, key[0])) if kind == "routes" else None)
                text = f"{line} is missing" if old is None else f"{line} differs"
                lines.setdefault(kind, []).append(text + (f": {hit}" if hit else ""))
        return {kind: tuple(found) for kind, found in lines.items()}

    def _concerns(self, kind: str, key: Any) -> bool:
        """Return whether a part is on the way of this address family."""
        text = key[0] if kind == "routes" else str(key)
        if kind == "routes":
            return self._s.target.cidr is not None and text == str(self._s.target.cidr)
        if kind in ("neighbours", "addresses"):
            return (":" in text) == (self._s.version == 6)
        if kind == "sysctls":
            return text.startswith("net/ipv4") or self._s.version == 6
        if kind == "flows" and "_src=" in text:
            return "ipv6_src" in text if self._s.version == 6 else "nw_src" in text
        return True

    # what packets do

    def _evidence(self, spaces: Mapping[int, tuple[int, str]]) -> Evidence:
        s = self._s
        pod = self._pod(spaces, s.source, s.target.address) if s.source.kind is Kind.POD else None
        there = s.peer is None and s.target.kind is Kind.POD
        target_pod = self._pod(spaces, s.target, s.source.address) if there else None
        port = pod[0].port.name if pod and pod[0].port else self._port_of(s.source.address)
        target_port = target_pod[0].port.name if target_pod and target_pod[0].port else ""
        start = From(pod[1], pod[0].interface.mtu, port, target_port) if pod else From(None, None, port, target_port)
        before = self._switch.counted() if s.peer else None
        sent = Packets(s, start, frozenset(self._links)).send()
        switch = self._counted(before, sent.seen) if s.peer else Switch()
        return self._assembled(
            pod[0] if pod else None, target_pod[0] if target_pod else None, sent, switch, self._blind(spaces)
        )

    def _port_of(self, address: IPAddress) -> str:
        """Return the port of kbr0 behind which an address is, as far as its neighbours and its FDB know."""
        kbr = self._links.get(KBR)
        if kbr is None:
            return ""
        entry = self._kernel.neighbours(address.version, kbr.number).get(str(address))
        return self._kernel.fdb(kbr.number).get(entry.mac, "") if entry else ""

    # counters

    def _counted(self, before: Any, seen: Mapping[Point, int]) -> Switch:
        s = self._s
        out_key = next((key for key in self._parts.flows if "in_port=LOCAL" in key), "")
        back_key = next((key for key in self._parts.flows if str(s.target.cidr or s.target.address) in key), "")
        port = next(iter(self._parts.ports), "")
        after = self._switch.counted()
        if before is None or after is None:
            return Switch(unanswered="ovs-vswitchd does not answer on obr0")
        # no event tells of it
        end = time.monotonic() + _SETTLE
        wanted = seen.get(Point.OBR, 0)
        while time.monotonic() < end and after.flows.get(out_key, 0) - before.flows.get(out_key, 0) < wanted:
            if out_key not in after.flows:
                break
            time.sleep(0.1)
            after = self._switch.counted() or after

        def grown(key: str) -> int | None:
            return after.flows[key] - before.flows.get(key, 0) if key in after.flows else None

        sent = received = None
        if port in after.ports and port in before.ports:
            received, sent = (after.ports[port][n] - before.ports[port][n] for n in (0, 1))
        return Switch(
            grown(out_key),
            grown(back_key),
            sent,
            received,
            port,
            self._errors.get(port, ""),
            self._switch.number(port),
            *self._shadows(port),
        )

    def _shadows(self, port: str) -> tuple[str, str]:
        """Return the unmanaged flows that take packets of this way, there and back; "" where none does."""
        s = self._s
        number = self._switch.number(port)
        peer_mac, own_mac = desired.mac(s.peer) if s.peer else "", desired.mac(s.me)
        out, back = s.source.address, s.target.address
        icmp, src, dst = ("icmp", "nw_src", "nw_dst") if s.version == 4 else ("icmp6", "ipv6_src", "ipv6_dst")
        found = []
        for in_port, mac, one, other in (("LOCAL", peer_mac, out, back), (number, own_mac, back, out)):
            picked = None
            if in_port is not None:
                picked = self._switch.picked(f"{icmp},in_port={in_port},dl_dst={mac},{src}={one},{dst}={other}")
            foreign = picked is not None and picked[1] != COOKIE and picked[0] != "priority 0"
            found.append(picked[0] if picked and foreign else "")
        return found[0], found[1]

    def _peer(self, sent: Sent) -> PeerFound | None:
        s = self._s
        if s.peer is None:
            return None
        cidr = next((c for c in s.peer.pod_cidrs if c.version == s.version), s.peer.pod_cidrs[0])
        echoes = {name: sent.helpers.get(name, EchoFound()) for name in ("gateway", "underlay", "unused")}
        agent, headline = "unknown", ""
        if echoes["gateway"].answered and self._found.facts is not None:
            paths = targets(self._mesh, s.me.name, self._found.facts).get(s.peer.name, ())
            agent, headline = ask_agent(self._mesh, s.peer, paths)
        return PeerFound(
            s.peer.name,
            s.peer.address,
            gateway(cidr),
            echoes["gateway"],
            echoes["underlay"],
            echoes["unused"],
            agent,
            headline,
            sent.heard,
            sent.underlay_errors,
            sent.path_mtu,
        )

    def _assembled(
        self, pod: PodFound | None, target_pod: PodFound | None, sent: Sent, switch: Switch, blind: int
    ) -> Evidence:
        s, kernel = self._s, self._kernel
        kbr = self._links.get(KBR)
        forwarded = s.source.kind is Kind.POD
        iif = kbr.number if kbr and forwarded else 0
        back_iif = kbr.number if kbr and s.peer else 0
        # each address as the kernel sees it: the host's own packets have no input link
        source, target = s.source.address, s.target.address
        mark = sent.mark
        route = kernel.route(target, source, iif, mark)
        back = kernel.route(source, target, back_iif) if s.peer and s.target.kind is not Kind.TUNNEL else RouteFound()
        near = kernel.neighbours(s.version, kbr.number) if kbr else {}
        hop = near.get(str(gateway(s.target.cidr) if s.peer and s.target.cidr else target))
        pod_entry = near.get(str(source))
        underlay = kernel.route(s.peer.address, s.me.address) if s.peer else RouteFound()
        have = self._found.have
        assert have is not None
        return Evidence(
            source=s.source,
            target=s.target,
            self_name=s.me.name,
            sent_from=sent.sent_from,
            mtu=s.mtu,
            seen=sent.seen,
            seen_full=sent.seen_full,
            rewritten=sent.rewritten,
            small=sent.small,
            full=sent.full,
            pod=pod,
            target_pod=target_pod,
            blind_ports=blind,
            links=self._checked(pod, target_pod),
            route=route,
            route_back=back,
            policy=kernel.policy(target, source, KBR if forwarded else "", mark),
            policy_back=kernel.policy(source, target, KBR) if s.peer else (),
            peer_mac=desired.mac(s.peer) if s.peer else "",
            neighbour=hop.mac if hop else "",
            pod_neighbour=pod_entry.mac if pod_entry else "",
            fdb=kernel.fdb(kbr.number) if kbr else {},
            underlay_route=underlay,
            underlay_link=self._links.get(underlay.dev),
            filter=remedied(sent.filter, Query((), (), self._mesh.cluster_cidrs, None)),
            switch=switch,
            peer=self._peer(sent),
            agent="" if self._agent_runs else "no agent runs on this node, so nothing is repaired",
            missing=self._missing(),
            unknown=have.unknown,
        )

    def _checked(self, *pods: PodFound | None) -> dict[str, LinkFound]:
        """Return the links of the way, each with what else may drop on it."""
        names = [KBR, OBR, *self._s.underlay, *(pod.port.name for pod in pods if pod and pod.port)]
        found = {}
        for name in names:
            link = self._links.get(name)
            if link is not None:
                tc = "tc filters" if self._kernel.traffic_filters(link.number) else ""
                found[name] = link._replace(filters=" and ".join(filter(None, (link.filters, tc))))
        return found


def _inside(address: IPAddress, other: IPAddress) -> tuple[LinkFound, PodFound] | None:
    """Return what a pod's own network looks like from inside; None where it does not have the address."""
    kernel = Kernel()
    try:
        links, addresses = kernel.links(), kernel.addresses()
        index = addresses.get(str(address))
        link = next((link for link in links.values() if link.number == index), None)
        if link is None or link.name == "lo":
            return None
        route = kernel.route(other, None)
        near: dict[str, Any] = {}
        with contextlib.suppress(StopIteration):
            out = next(link for link in links.values() if link.name == route.dev)
            near = kernel.neighbours(address.version, out.number)
        entry = near.get(route.via or str(other))
        safe = link._replace(name=printable(link.name, 32))
        route = route._replace(dev=printable(route.dev, 32))
        return link, PodFound("", safe, None, route, entry.mac if entry else "", bool(entry and entry.state & 0x80))
    finally:
        kernel.close()
