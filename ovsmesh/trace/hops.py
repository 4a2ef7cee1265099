"""The hops of a way, each as it is configured: what was wanted there beside what was found. Pure.

Whether packets pass is not decided here: see verdict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ovsmesh.dataplane.types import KBR, OBR
from ovsmesh.linux.rtnetlink import deciding
from ovsmesh.mesh.types import IPAddress, IPNetwork, gateway
from ovsmesh.text import listed
from ovsmesh.trace.types import (
    REFUSED_SOURCE,
    Evidence,
    Hop,
    Kind,
    LinkFound,
    Place,
    PodFound,
    Point,
    PolicyRule,
    RouteFound,
    Verdict,
)

OK, BROKEN, UNKNOWN = Verdict.OK, Verdict.BROKEN, Verdict.UNKNOWN


def repair(e: Evidence) -> str:
    """Return what to do about a managed part that is missing or differs."""
    if e.agent:
        return "start this node's agent, which puts it back: systemctl start ovsmesh-agent"
    return "the agent repairs this within a second; if it stays, `ovsmesh status` says what is in the way"


def _missing(e: Evidence, kind: str, *words: str) -> str:
    """Return what of a kind is not as wanted, "" for nothing; only lines with one of `words`, if there are any."""
    lines = [line for line in e.missing.get(kind, ()) if not words or any(word in line for word in words)]
    return listed(lines, 3, "; ")


def hops(e: Evidence) -> list[Hop]:
    """Return the hops from the source to the target and back, without the filter, the peer and the agents."""
    found = [*(_from_pod(e) if e.source.kind is Kind.POD else _from_host(e))]
    local = e.peer is None
    if local and e.target.kind is Kind.POD:
        found += [*_to_local_pod(e)]
    elif not local:
        tunnelled = e.target.kind is not Kind.TUNNEL
        found += [*_routed(e)]
        found += [*_to_peer(e)] if tunnelled else [_underlay(e, Point.KBR_IN)]
    return found


def back(e: Evidence) -> list[Hop]:
    """Return the hops of the answer on this node, behind its arrival from the peer."""
    if e.peer is None or e.target.kind is Kind.TUNNEL:
        return []
    found = [_flow_back(e)]
    if e.source.kind is Kind.POD:
        found += [_route_back(e), _pod_neighbour(e)]
        if e.sent_from == "pod":
            found.append(Hop("back in the pod", "answers come back", after=Point.PORT_BACK))
    return found


# the source


def _from_host(e: Evidence) -> Iterator[Hop]:
    if e.source.kind is Kind.OTHER and e.peer is not None and e.target.kind is not Kind.TUNNEL:
        yield _other_source(e)
        yield _bridge(e, Point.SENT)
        return
    where = str(e.source.kind)
    problem = _missing(e, "addresses") if e.source.kind is Kind.GATEWAY else ""
    problem = problem or e.small.refused
    yield Hop(
        "source",
        problem or f"{e.source.address}, {where} of this node",
        BROKEN if problem else OK,
        f"{e.source.address} on this node, and packets leave" if problem else "",
        repair(e) if problem else "",
        Point.SENT,
    )
    yield _bridge(e, Point.SENT)


def _other_source(e: Evidence) -> Hop:
    """Return the hop of a host's own packet with an address that is not the mesh's: the peers' switches refuse it."""
    source, instead = e.source, e.source.instead
    if e.small.answered:
        return Hop("source", f"{source.address} of {source.link}, which something here changes", OK, after=Point.SENT)
    todo = f"have the program use {instead}, or none, so that the kernel takes it"
    tool = "iptables" if source.address.version == 4 else "ip6tables"
    nat = f"{tool} -t nat -A POSTROUTING -o {KBR} -s {source.address} -j SNAT --to-source {instead}"
    return Hop(
        "source",
        f"{source.address} of {source.link} is neither in this node's ranges nor its tunnel address: peers refuse it",
        BROKEN,
        f"{instead}, this node's gateway" if instead else "this node's tunnel address",
        f"{todo}; or change it on the way: {nat}" if instead else "have the program use the tunnel address",
        Point.SENT,
        Point.UNDERLAY,
    )


def _from_pod(e: Evidence) -> Iterator[Hop]:
    pod = e.pod
    if pod is None:
        yield _unseen_source(e)
        yield _bridge(e, Point.SENT)
        return
    yield _interface(e, "source", pod, Point.SENT)
    if "filter" in e.small.refused:
        todo = "look at the pod's own rules: nft list ruleset, iptables-save, in its namespace"
        yield Hop("filter in the pod", f"it can't be sent: {e.small.refused}", BROKEN, "accepted", todo, Point.SENT)
    yield _pod_route(e, "route in the pod", pod, e.target.address, Point.SENT, e.source.cidr)
    if pod.gateway_mac and (kbr := e.links.get(KBR)) and _own_gateway(e.source.cidr) == pod.route.via:
        wrong = pod.gateway_mac != kbr.mac
        yield Hop(
            "gateway in the pod",
            f"{pod.route.via} is {pod.gateway_mac}{' (static)' if pod.gateway_static else ''}",
            BROKEN if wrong else OK,
            f"{kbr.mac}, {KBR}'s",
            f"delete that neighbour entry in the pod: ip neigh del {pod.route.via} dev {pod.route.dev}"
            if wrong
            else "",
            Point.SENT,
            Point.PORT,
        )
    yield _port(e, "bridge port", pod, Point.SENT)
    yield _bridge(e, Point.PORT)


def _own_gateway(cidr: IPNetwork | None) -> str:
    return str(gateway(cidr)) if cidr is not None else ""


def _unseen_source(e: Evidence) -> Hop:
    if e.blind_ports:
        text = f"behind one of {e.blind_ports} ports of {KBR} that can't be looked into from here"
        return Hop("source", text, UNKNOWN, f"a pod with {e.source.address} on {KBR}", after=Point.SENT)
    return Hop(
        "source",
        f"no pod on {KBR} has {e.source.address}",
        BROKEN,
        f"a pod with {e.source.address} on {KBR}",
        "the pod is gone, or is plugged into another network: see `ip -br link show master kbr0`",
        Point.SENT,
    )


def _interface(e: Evidence, name: str, pod: PodFound, after: Point) -> Hop:
    link = pod.interface
    wanted = f"{link.name} up, MTU {e.mtu}"
    state = "up" if link.up else "DOWN"
    found = f"{link.name} {state}, MTU {link.mtu} ({pod.where})"
    todo = ""
    if pod.others:
        found, todo = f"{found}; {listed(pod.others, 3)} has its address too", "give one of the two another address"
    elif not link.up:
        todo = f"set it up in the pod: ip link set {link.name} up"
    elif link.mtu != e.mtu:
        todo = f"packets above {min(link.mtu, e.mtu)} bytes are lost: make the pod again, or set its MTU to {e.mtu}"
    return Hop(name, found, BROKEN if todo else OK, wanted, todo, after)


def _pod_route(e: Evidence, name: str, pod: PodFound, other: IPAddress, after: Point, cidr: IPNetwork | None) -> Hop:
    route, own = pod.route, _own_gateway(cidr)
    same = e.peer is None and e.source.cidr == e.target.cidr
    wanted = f"dev {pod.interface.name}" if same and not route.via else f"via {own} dev {pod.interface.name}"
    todo = ""
    if not route.type or route.error or route.type not in ("unicast", "local"):
        todo = f"give the pod a route: ip route add default via {own}"
    elif route.dev != pod.interface.name:
        todo = f"the pod sends this out by {route.dev}: correct its routes"
    elif route.via not in (own, "") or (not route.via and not same):
        todo = f"correct the pod's route to {other}: its gateway is {own}"
    return Hop(name, str(route), BROKEN if todo else OK, wanted, todo, after)


def _port(e: Evidence, name: str, pod: PodFound, after: Point) -> Hop:
    port = pod.port
    wanted = f"a port of {KBR}, up, forwarding"
    if port is None:
        return Hop(name, "its other end is not on this host", UNKNOWN, wanted, after=after)
    port = e.links.get(port.name, port)
    flaws = []
    if not port.up:
        flaws.append(("DOWN", f"ip link set {port.name} up"))
    if port.master != KBR:
        flaws.append((f"on {port.master or 'no bridge'}", f"ip link set {port.name} master {KBR}"))
    elif port.up and port.port_state != 3 and (bridge := e.links.get(KBR)) is not None and bridge.up:
        flaws.append(("not forwarding (state " + str(port.port_state) + ")", "look at STP on kbr0: bridge -d link"))
    if port.up and not port.running and pod.interface.up:
        flaws.append(("without a carrier", "its other end is down"))
    found = f"{port.name} {', '.join(flaw for flaw, _ in flaws) or f'up on {KBR}, forwarding'}"
    if port.filters:
        found += f" ({port.filters})"
    todo = listed((todo for _, todo in flaws), 3, "; ")
    # the host answers ARP on a port that is on no bridge, and routes what comes in there: the answer finds no way
    until = Point.PORT_BACK if after == Point.SENT else ""
    return Hop(name, found, BROKEN if flaws else OK, wanted, todo, after, until)


def _link_text(link: LinkFound | None) -> str:
    return f"{'up' if link.up else 'DOWN'}, MTU {link.mtu}, {link.mac}" if link else "missing"


def _bridge(e: Evidence, after: Point) -> Hop:
    link = e.links.get(KBR)
    problem = listed(filter(None, (_missing(e, "links", f"link {KBR} "), _missing(e, "addresses"))), 3, "; ")
    if link is None or not link.up:
        problem = problem or f"{KBR} is {'missing' if link is None else 'down'}"
        # its ports then take nothing in
        after = Point.SENT
    return Hop(
        KBR,
        problem or _link_text(link),
        BROKEN if problem else OK,
        f"up, MTU {e.mtu}",
        repair(e) if problem else "",
        after,
        # its routes go with its address
        Point.KBR_IN if problem else "",
    )


# routing


def _routed(e: Evidence) -> Iterator[Hop]:
    forwarded = e.source.kind is Kind.POD
    after = Point.KBR_IN if forwarded else Point.SENT
    problem = _missing(e, "sysctls")
    if forwarded or problem:
        yield Hop(
            "forwarding",
            problem or "ip_forward and the settings of kbr0 are as wanted",
            BROKEN if problem else OK,
            "as `ovsmesh plan` has them" if problem else "",
            repair(e) if problem else "",
            after,
        )
    yield _policy(e, after)
    yield _route(e, after)


def _policy(e: Evidence, after: Point) -> Hop:
    """Return the hop of the policy rules: the route must come from table main, or be the same as there."""
    table = e.route.table
    if REFUSED_SOURCE in e.route.error and (early := _early(e)):
        found = f"rule {early[0].priority}: {early[0].text} wins over table main for answers, so the source is refused"
        ip = "ip" if e.source.address.version == 4 else "ip -6"
        todo = f"delete or correct that rule: {ip} rule del priority {early[0].priority}"
        return Hop("policy rules", found, BROKEN, "table main decides", todo, after)
    rule = deciding(e.policy, e.route)
    if rule is None and table in (254, 255):
        others = len([r for r in e.policy if r.matches and r.priority < 32766 and r.table != 255])
        more = f"; {others} before it match and decide nothing" if others else ""
        return Hop("policy rules", f"table main decides{more}", OK, "table main decides", after=after)
    if rule is None:
        return Hop("policy rules", f"table {table} decides", BROKEN, "table main decides", "see `ip rule`", after)
    found = f"rule {rule.priority}: {rule.text} wins over table main"
    if _as_wanted(e, e.route):
        return Hop("policy rules", f"{found}, with the same route", OK, "table main decides", after=after)
    return Hop("policy rules", found, BROKEN, "table main decides", _before(rule, e.target), after)


def _before(rule: PolicyRule, target: Place) -> str:
    """Return the command that lets table main decide before a rule."""
    ip = "ip" if target.address.version == 4 else "ip -6"
    remove = f"delete or correct that rule: {ip} rule del priority {rule.priority}"
    if rule.priority < 2 or target.cidr is None:
        return remove
    add = f"{ip} rule add priority {rule.priority - 1} to {target.cidr} lookup main"
    return f"{remove}; or let {target.cidr} come first: {add}"


def _early(e: Evidence) -> list[PolicyRule]:
    """Return the rules before table main that match an answer."""
    return [r for r in e.policy_back if r.matches and r.priority < 32766 and r.table != 255]


def _as_wanted(e: Evidence, route: RouteFound) -> bool:
    if e.target.cidr is None:
        return route.type == "unicast" and not route.error
    return (route.type, route.via, route.dev) == ("unicast", _own_gateway(e.target.cidr), KBR) and not route.error


def _route(e: Evidence, after: Point) -> Hop:
    if e.target.kind is Kind.TUNNEL:
        problem = "" if _as_wanted(e, e.route) else str(e.route)
        todo = f"this host has no route to {e.target.address}" if problem else ""
        return Hop("route", str(e.route), BROKEN if problem else OK, "any", todo, after)
    wanted = f"{e.target.cidr} via {_own_gateway(e.target.cidr)} dev {KBR} mtu {e.mtu}"
    problem = _missing(e, "routes")
    if _as_wanted(e, e.route) and not problem:
        return Hop("route", str(e.route), OK, wanted, after=after)
    text = f"{e.route}; {problem}" if problem else str(e.route)
    if problem:
        return Hop("route", text, BROKEN, wanted, repair(e), after)
    if e.route.table not in (254, 255):
        return Hop("route", text, UNKNOWN, wanted, "the policy rule above decides", after)
    return Hop("route", text, BROKEN, wanted, "another route or setting wins: see `ip route get` and `ip route`", after)


# to the peer


def _to_peer(e: Evidence) -> Iterator[Hop]:
    after = Point.KBR_IN if e.source.kind is Kind.POD else Point.SENT
    hop = _own_gateway(e.target.cidr)
    wrong = e.neighbour not in ("", e.peer_mac)
    problem = f"{hop} is {e.neighbour}" if wrong else _missing(e, "neighbours")
    yield Hop(
        "neighbour",
        problem or f"{hop} is {e.neighbour or 'unknown'}, permanent",
        BROKEN if problem or not e.neighbour else OK,
        f"{hop} is {e.peer_mac}, permanent",
        repair(e) if problem or not e.neighbour else "",
        after,
        Point.KBR_OUT if wrong else "",
    )
    link = e.links.get(OBR)
    problem = _missing(e, "links", f"link {OBR} ") or _missing(e, "bridges")
    if link is None or not link.up or link.master != KBR or not link.running:
        flaw = "missing" if link is None else "down" if not link.up else f"not on {KBR}" if link.master != KBR else ""
        problem = problem or f"{OBR} is {flaw or 'without a carrier: is ovs-vswitchd running?'}"
    yield Hop(
        OBR,
        problem or f"up on {KBR}, MTU {link.mtu if link else '?'}",
        BROKEN if problem else OK,
        f"up on {KBR}, MTU {e.mtu}",
        repair(e) if problem else "",
        Point.KBR_OUT,
    )
    problem = _missing(e, "fdb")
    port = e.fdb.get(e.peer_mac, "")
    yield Hop(
        "FDB entry",
        problem or f"{e.peer_mac} is behind {port or 'no port'}",
        BROKEN if problem or port != OBR else OK,
        f"{e.peer_mac} behind {OBR}",
        repair(e) if problem or port != OBR else "",
        Point.KBR_OUT,
    )
    yield _flow(e)
    yield _tunnel_port(e)
    yield _underlay(e, Point.OBR)


def _flow(e: Evidence) -> Hop:
    switch, name = e.switch, f"flow in {OBR}"
    wanted = "in_port=LOCAL to the tunnel port"
    if switch.unanswered or "flows" in e.unknown:
        todo = f"start {'ovsdb-server' if 'ports' in e.unknown else 'ovs-vswitchd'}, or see its log"
        return Hop(name, switch.unanswered or "the flow table can't be read", BROKEN, wanted, todo, Point.OBR)
    problem = _missing(e, "flows", "in_port=LOCAL", "flow 0")
    if e.missing.get("ports") and problem.endswith("differs"):
        return Hop(name, "its port is not there", OK, wanted, after=Point.OBR)
    if problem:
        return Hop(name, problem, BROKEN, wanted, repair(e), Point.OBR)
    if switch.shadow_out:
        todo = f"an unmanaged flow comes first: see `ovs-ofctl dump-flows {OBR}`, and delete it"
        return Hop(name, f"another flow takes the packet: {switch.shadow_out}", BROKEN, wanted, todo, Point.OBR)
    return Hop(name, f"in place, {_packets(switch.flow_out)}", OK, wanted, after=Point.OBR)


def _packets(number: int | None) -> str:
    return "not counted" if number is None else f"{number} more packet{'' if number == 1 else 's'}"


def _tunnel_port(e: Evidence) -> Hop:
    switch = e.switch
    wanted = "the peer's port, without an error"
    if "ports" in e.unknown:
        return Hop("tunnel port", "ovsdb-server does not answer", UNKNOWN, wanted, "start it", Point.OBR)
    problem = _missing(e, "ports") or switch.port_error
    if not problem and switch.port_number is None:
        problem = "ovs-vswitchd has not made it"
    if problem:
        todo = "see `ovs-vsctl show` and the log of ovs-vswitchd" if switch.port_error else repair(e)
        return Hop("tunnel port", problem, BROKEN, wanted, todo, Point.OBR)
    counts = f"{_packets(switch.port_out)} out, {_packets(switch.port_back)} in"
    return Hop("tunnel port", f"in place, {counts}", OK, wanted, after=Point.OBR)


def _underlay(e: Evidence, after: Point) -> Hop:
    assert e.peer is not None
    route, link = e.underlay_route, e.underlay_link
    wanted = f"a route to {e.peer.address} that is not in the mesh"
    if route.error or route.type != "unicast":
        todo = f"give this host a route to {e.peer.address}, or correct the mesh's address of {e.peer.name}"
        return Hop("underlay route", str(route), BROKEN, wanted, todo, after)
    if route.dev in (KBR, OBR):
        return Hop("underlay route", str(route), BROKEN, wanted, "tunnel packets must not go into the tunnel", after)
    mtu = f", link MTU {link.mtu}" if link else ""
    down = link is not None and not (link.up and link.running)
    found = f"{route}{mtu}{' (link DOWN)' if down else ''}"
    todo = f"set it up: ip link set {route.dev} up, or look at its cable" if down else ""
    return Hop("underlay route", found, BROKEN if down else OK, wanted, todo, after)


# to a pod of this node


def _to_local_pod(e: Evidence) -> Iterator[Hop]:
    pod = e.target_pod
    if pod is None:
        if e.blind_ports:
            text = f"behind one of {e.blind_ports} ports of {KBR} that can't be looked into from here"
            yield Hop("destination", text, UNKNOWN, f"a pod with {e.target.address} on {KBR}", after=Point.SENT)
        else:
            todo = "the pod is gone, or is plugged into another network"
            text = f"no pod on {KBR} has {e.target.address}"
            yield Hop("destination", text, BROKEN, f"a pod with {e.target.address} on {KBR}", todo, Point.SENT)
        return
    # a pod asks for the MAC of another one on its node, so one that can't answer is never sent to
    asked = e.pod is not None and not e.pod.route.via
    port = _port(e, "destination's port", pod, Point.KBR_OUT)
    inside = _interface(e, "destination", pod, Point.TARGET_PORT)
    yield replace(port, after=Point.SENT, until=Point.KBR_OUT) if asked else port
    yield replace(inside, after=Point.SENT, until=Point.TARGET_PORT) if asked else inside
    route = _pod_route(e, "its route back", pod, e.source.address, Point.TARGET_PORT, e.target.cidr)
    if not pod.route.via and pod.route.type == "unicast" and pod.route.dev == pod.interface.name:
        route = replace(route, verdict=OK, todo="")
    yield route


# the answer


def _flow_back(e: Evidence) -> Hop:
    name, wanted = f"flow back in {OBR}", "in_port=the tunnel port to LOCAL"
    problem = _missing(e, "flows", "in_port=" + e.switch.port_name) if e.switch.port_name else ""
    if problem:
        return Hop(name, problem, BROKEN, wanted, repair(e), Point.UNDERLAY_BACK)
    if e.switch.shadow_back:
        todo = f"an unmanaged flow comes first: see `ovs-ofctl dump-flows {OBR}`, and delete it"
        return Hop(
            name, f"another flow takes the packet: {e.switch.shadow_back}", BROKEN, wanted, todo, Point.UNDERLAY_BACK
        )
    return Hop(name, f"in place, {_packets(e.switch.flow_back)}", OK, wanted, after=Point.UNDERLAY_BACK)


def _route_back(e: Evidence) -> Hop:
    route = e.route_back
    wanted = f"{e.source.cidr} dev {KBR}"
    good = route.type == "unicast" and route.dev == KBR and not route.error
    early = _early(e)
    text = str(route)
    if early and not good:
        text = f"{text}: rule {early[0].priority}: {early[0].text} wins over table main"
    todo = "" if good else f"see `ip route get {e.source.address} from {e.target.address} iif {KBR}` and `ip rule`"
    return Hop("route back", text, OK if good else BROKEN, wanted, todo, Point.KBR_IN_BACK)


def _pod_neighbour(e: Evidence) -> Hop:
    name = "pod's neighbour"
    if e.pod is None or not e.pod.interface.mac:
        return Hop(name, e.pod_neighbour or "none yet", UNKNOWN, after=Point.KBR_IN_BACK)
    wanted = f"{e.source.address} is {e.pod.interface.mac}"
    port = e.pod.port.name if e.pod.port else ""
    if e.pod_neighbour and e.pod_neighbour != e.pod.interface.mac:
        todo = f"delete that entry: ip neigh del {e.source.address} dev {KBR}"
        found = f"{e.source.address} is {e.pod_neighbour}"
        return Hop(name, found, BROKEN, wanted, todo, Point.KBR_IN_BACK, Point.PORT_BACK)
    behind = e.fdb.get(e.pod.interface.mac, "")
    if behind and port and behind != port:
        todo = f"delete that FDB entry: bridge fdb del {e.pod.interface.mac} dev {behind} master"
        return Hop(
            name, f"{e.pod.interface.mac} is behind {behind}", BROKEN, f"behind {port}", todo, Point.KBR_OUT_BACK
        )
    found = f"{e.source.address} is {e.pod_neighbour}" if e.pod_neighbour else "none yet; it is asked for"
    return Hop(name, found, OK, wanted, after=Point.KBR_IN_BACK)
