"""Decide at which hop packets stop, from where they were seen and from what is not as wanted. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from ovsmesh.text import counted, listed
from ovsmesh.trace import hops as configured
from ovsmesh.trace.types import Drop, EchoFound, Evidence, Hop, Kind, PeerFound, Point, Trace, Verdict

OK, BROKEN, UNKNOWN = Verdict.OK, Verdict.BROKEN, Verdict.UNKNOWN
_THERE = (Point.SENT, Point.PORT, Point.KBR_IN, Point.KBR_OUT, Point.OBR, Point.UNDERLAY, Point.TARGET_PORT)
_LOST = 0.05
"""Share of lost packets from which a way counts as lossy, if two are lost: the first of a tunnel may be."""
_CARRIED_BY = {"gre": "GRE (IP protocol 47)", "vxlan": "VXLAN (UDP port 4789)", "geneve": "Geneve (UDP port 6081)"}
_IN_THE_POD = "look at the pod's own rules: nft list ruleset, iptables-save, in its namespace"


def order(e: Evidence) -> list[Point]:
    """Return the points that packets of this way pass and that can be seen, in their order."""
    pod = e.source.kind is Kind.POD
    if e.peer is not None and e.target.kind is Kind.TUNNEL:
        way = [Point.PORT, Point.KBR_IN, Point.PORT_BACK] if pod else []
    elif e.peer is not None:
        out = [Point.PORT, Point.KBR_IN] if pod and e.sent_from == "pod" else []
        tail = [Point.KBR_OUT_BACK, Point.PORT_BACK] if pod else []
        way = [
            *out,
            Point.KBR_OUT,
            Point.OBR,
            Point.UNDERLAY,
            Point.UNDERLAY_BACK,
            Point.OBR_BACK,
            Point.KBR_IN_BACK,
            *tail,
        ]
    elif e.target.kind is Kind.POD and pod:
        way = [Point.PORT, Point.TARGET_PORT, Point.TARGET_PORT_BACK, Point.PORT_BACK]
    elif e.target.kind is Kind.POD:
        way = [Point.KBR_OUT, Point.TARGET_PORT, Point.TARGET_PORT_BACK, Point.KBR_IN_BACK]
    else:
        way = [Point.PORT, Point.KBR_IN, Point.KBR_OUT_BACK, Point.PORT_BACK] if pod else []
    return [p for p in (Point.SENT, *way, Point.ANSWERED) if p in e.seen]


def stop(seen: Mapping[Point, int], points: Sequence[Point], lossy: bool = False) -> Point | None:
    """Return the last point that packets passed, None where they passed all.

    `lossy`: the one before the largest loss. A point that saw none although a later one did is skipped.
    """
    known = [p for n, p in enumerate(points) if seen[p] or not any(seen[q] for q in points[n:])]
    if lossy:
        losses = [(seen[a] - seen[b], -n, a) for n, (a, b) in enumerate(pairwise(known))]
        return max(losses)[2] if losses else None
    reached = [p for p in known if seen[p]]
    if not reached:
        return Point.SENT
    return None if reached[-1] is points[-1] else reached[-1]


def decide(e: Evidence, encapsulation: str) -> Trace:
    """Return the hops with their verdicts, and where the packets stop."""
    points = order(e)
    answered, lossy = e.small.answered > 0, _lossy(e.small)
    cut = answered and not lossy and e.full.sent > 0 and e.full.answered == 0
    cut = cut or (answered and not lossy and bool(e.full.refused))
    seen = e.seen_full if cut and e.seen_full else e.seen
    at = None
    if not answered or lossy or cut:
        at = stop(seen, [p for p in points if p in seen], lossy) or (points[-2] if len(points) > 1 else Point.SENT)
    if at is Point.OBR and e.peer and _unresolved(e, e.peer) and Point.UNDERLAY in points:
        at = Point.UNDERLAY
    found = [*configured.hops(e)]
    # what the filter did stands where packets were dropped, else where they are routed
    there = at is None or at in _THERE
    found.insert(
        _place(found, points, at if there and at is not None and e.filter.drops else Point.KBR_IN),
        _filter(e, at, False),
    )
    if e.peer is not None:
        found += _network(e, at, cut, lossy, encapsulation)
        found += configured.back(e)
        if e.target.kind is not Kind.TUNNEL:
            where = at if at is not None and not there and e.filter.drops else Point.KBR_IN_BACK
            found.insert(_place(found, points, where), _filter(e, at, True))
        found.append(_peer_agent(e.peer))
    found.append(_own_agent(e))
    found = [_reached(hop, points, at) for hop in found]
    index = _stop_index(found, points, at)
    if e.sent_from == "host for the pod" and found[0].verdict is BROKEN:
        # the packets of a pod that is not there were sent from this node
        index = 0
    if at is not None and index is None:
        index = _blame(found, points, at)
    if index is not None:
        found[index] = _blamed(found[index], e, at, lossy, cut)
        found[index + 1 :] = [_unreached(hop, e) for hop in found[index + 1 :]]
    return _trace(e, found, index, at)


def _unresolved(e: Evidence, p: PeerFound) -> bool:
    """Return whether the tunnel port sends, and only the way to the peer's host is missing: nobody answers for it."""
    return (e.switch.port_out or 0) >= e.small.sent > 0 and p.underlay_echo.sent > 0 and not p.underlay_echo.answered


def _lossy(found: EchoFound) -> bool:
    lost = found.sent - found.answered
    return found.answered > 0 and lost >= 2 and lost / found.sent >= _LOST


def _segment(point: str, points: Sequence[Point]) -> int:
    """Return the index of the last point in sight that is not behind `point`; -1 for none."""
    every = list(Point)
    if point not in every:
        return -1
    limit = every.index(Point(point))
    return max((n for n, p in enumerate(points) if every.index(p) <= limit), default=-1)


def _place(found: Sequence[Hop], points: Sequence[Point], point: Point) -> int:
    """Return where a hop of this segment is inserted: behind what decides the route, before what sends."""
    at = _segment(point, points)
    inside = [n for n, hop in enumerate(found) if hop.after and _segment(hop.after, points) == at]
    before = [n for n in inside if found[n].name in ("neighbour", "pod's neighbour")]
    if before:
        return before[0]
    earlier = [n for n, hop in enumerate(found) if hop.after and _segment(hop.after, points) <= at]
    return (inside[-1] + 1) if inside else (earlier[-1] + 1 if earlier else len(found))


def _reached(hop: Hop, points: Sequence[Point], at: Point | None) -> Hop:
    """Return the hop; what is as wanted and was not passed by a packet is unknown."""
    if at is None or hop.verdict is not OK or not hop.after or at not in points:
        return hop
    if _segment(hop.after, points) > points.index(at):
        return replace(hop, verdict=UNKNOWN, reached=False)
    return hop


def _unreached(hop: Hop, e: Evidence) -> Hop:
    """Return a hop behind the one at which packets stop; this node's own pings may have passed the network."""
    proved = hop.name.startswith("network to") and e.peer is not None and e.peer.gateway_echo.answered
    if not hop.after or hop.verdict is not OK or proved or e.small.answered:
        return hop
    return replace(hop, verdict=UNKNOWN, reached=False)


def _stop_index(found: Sequence[Hop], points: Sequence[Point], at: Point | None) -> int | None:
    """Return the broken hop at which packets stop: the first one there, else one that has sent them astray before."""
    if at is None:
        return None
    here = points.index(at) if at in points else 0
    broken = [n for n, hop in enumerate(found) if hop.verdict is BROKEN and hop.after]
    for n in broken:
        after = _segment(found[n].after, points)
        if after == here or after < here <= _segment(found[n].until, points):
            return n
    return None


def _blame(found: Sequence[Hop], points: Sequence[Point], at: Point) -> int | None:
    """Return the hop that stands for a segment in which packets vanish for a reason that nothing shows."""
    here = points.index(at) if at in points else 0
    inside = [n for n, hop in enumerate(found) if hop.after and _segment(hop.after, points) == here]
    for wanted in _SUSPECTS:
        for n in inside:
            if found[n].name.startswith(wanted):
                return n
    return inside[-1] if inside else None


_SUSPECTS = ("network to", "filter", "tunnel port", "destination", "bridge port", "back in the pod")
"""Beginnings of the names of hops that drop packets without a trace, the likeliest first."""


def _blamed(hop: Hop, e: Evidence, at: Point | None, lossy: bool, cut: bool) -> Hop:
    """Return the hop at which packets stop, with what was seen."""
    if hop.verdict is BROKEN:
        return hop
    lost = f"packets of {e.full.size} bytes" if cut else "packets"
    if lossy:
        lost = f"{e.small.sent - e.small.answered} of {e.small.sent} packets"
    if hop.name.startswith("network to"):
        name = e.peer.name if e.peer else ""
        text, todo = f"{lost} are lost", f"look at the links between {e.self_name} and {name}, at both ends' errors"
        return replace(hop, verdict=BROKEN, found=f"{hop.found}; {text}", todo=todo)
    if hop.name == "back in the pod":
        return replace(hop, verdict=BROKEN, found="answers reach its interface, and it drops them", todo=_IN_THE_POD)
    links = listed(dict.fromkeys(f"{link.name} has {link.filters}" for link in e.links.values() if link.filters))
    text = f"{lost} are lost behind {at}, and nothing shows why{f'; {links}' if links else ''}"
    todo = f"look at tc and XDP, and with tcpdump, behind {at}"
    return replace(
        hop,
        verdict=BROKEN,
        found=f"{hop.found}; {text}",
        todo=hop.todo or todo,
    )


# the filter


def _filter(e: Evidence, at: Point | None, back: bool) -> Hop:
    there = at is None or at in _THERE
    name, wanted = ("filter, back" if back else "filter"), "accepted by every table"
    default = Point.KBR_IN_BACK if back else (Point.KBR_IN if e.source.kind is Kind.POD else Point.SENT)
    drops = _drops(e, at) if back != there else ()
    if at is None and e.small.answered and not _lossy(e.small):
        drops = ()
    if drops:
        text = listed((f"{drop.rule}, {drop.table}" for drop in drops), 2, "; ")
        how = "dropped by" if drops[0].certain else "dropped, as it seems by"
        todo = drops[0].todo or "delete or correct that rule"
        return Hop(name, f"{how} {text}", BROKEN, wanted, todo, at or default)
    # a second link's address has to be changed, or the peer refuses it
    if not back and e.rewritten and not (e.source.kind is Kind.OTHER and e.small.answered):
        text = f"the {e.rewritten.partition(' ')[0]} of packets becomes {e.rewritten.partition(' ')[2]}: somebody's NAT"
        more = f" (tables of others: {listed(e.filter.tables, 4)})"
        todo = "exclude the mesh's ranges from that rule: nft list ruleset, iptables-save -t nat"
        return Hop(name, text + more, BROKEN, "no address is changed", todo, default)
    if not back and e.sent_from == "host for the pod":
        text = "not seen: packets of this node itself take another hook than a pod's"
        return Hop(name, text, UNKNOWN, wanted, after=default)
    tables = f"tables of others: {listed(e.filter.tables, 4)}" if e.filter.tables else "no tables of others"
    hooks = {h.hook for h in e.filter.hooks if h.back == back and h.first == h.last}
    passed = f"accepted at {counted(len(hooks), 'hook')}" if hooks else "no packet came to it"
    if e.filter.blind:
        passed = e.filter.blind
    others = "" if back or not e.filter.suspects else "; dropped there, if it matches: "
    others += "" if not others else listed((f"{drop.rule}, {drop.table}" for drop in e.filter.suspects), 2, "; ")
    return Hop(name, f"{passed}; {tables}{others}", OK, wanted, after=default)


def _drops(e: Evidence, at: Point | None) -> tuple[Drop, ...]:
    """Return the drops that met packets of the trace; doubtful ones only where nothing else explains a loss."""
    certain = tuple(drop for drop in e.filter.drops if drop.certain)
    if certain or at is None:
        return certain
    short = any(hook.first > hook.last for hook in e.filter.hooks)
    local = at in (
        Point.PORT,
        Point.KBR_IN,
        Point.KBR_OUT,
        Point.OBR_BACK,
        Point.KBR_IN_BACK,
        Point.KBR_OUT_BACK,
        Point.SENT,
    )
    return e.filter.drops if short or (e.filter.blind and local) else ()


# the network and the peer


def _network(e: Evidence, at: Point | None, cut: bool, lossy: bool, encapsulation: str) -> list[Hop]:
    p = e.peer
    assert p is not None
    if e.target.kind is Kind.TUNNEL:
        return [_underlay_answer(e, p, at)]
    far = at is Point.UNDERLAY and not cut and not lossy
    through = e.small.answered > 0 or p.gateway_echo.answered > 0 or any(_of_peer(error, p) for error in e.small.errors)
    found = [_tunnel(e, p, far, through, encapsulation)]
    if cut or e.full.answered:
        found.append(_path_mtu(e, p, cut))
    if e.target.kind is Kind.POD:
        found.append(_destination(e, p, far and through))
    return found


def _of_peer(error: str, p: PeerFound) -> bool:
    """Return whether an ICMP error was sent by the peer, so that the tunnel has carried both."""
    return error.startswith((f"{p.gateway}: ", f"{p.address}: "))


def _underlay_answer(e: Evidence, p: PeerFound, at: Point | None) -> Hop:
    good = e.small.answered > 0
    text = "it answers" if good else listed(e.small.errors) or "no answer"
    return Hop(f"host of {p.name}", text, OK if good else BROKEN, "it answers", after=Point.KBR_IN)


def _tunnel(e: Evidence, p: PeerFound, far: bool, through: bool, encapsulation: str) -> Hop:
    name = f"network to {p.name}"
    carried = _CARRIED_BY.get(encapsulation, encapsulation)
    wanted = "tunnel packets arrive, and answers come back"
    if through:
        trip = p.gateway_echo.round_trip
        text = f"{p.gateway} answers through the tunnel" + (f" in {trip * 1000:.1f} ms" if trip is not None else "")
        return Hop(
            name,
            text if p.gateway_echo.answered else "answers come back through the tunnel",
            OK,
            wanted,
            after=Point.UNDERLAY,
        )
    if not far:
        return Hop(name, f"{p.gateway} does not answer", UNKNOWN, wanted, after=Point.UNDERLAY)
    ends = f"{e.self_name} and {p.name} ({p.address})"
    if p.underlay_errors:
        text = f"tunnel packets are answered with an ICMP error by {listed(p.underlay_errors, 2)}"
        return Hop(name, text, BROKEN, wanted, f"allow {carried} between {ends}", Point.UNDERLAY)
    if p.heard:
        text = f"its tunnel packets arrive here, and ours are not answered: {carried} is blocked from here to {p.name}"
        todo = f"allow {carried} to {p.address}; on {p.name}: `ovsmesh status`"
    elif p.underlay_echo.answered:
        text = (
            f"{p.address} answers pings, and no tunnel packet comes back: {carried} is blocked, or its switch is down"
        )
        todo = f"allow {carried} between {ends}; on {p.name}: `ovsmesh status`"
    else:
        text = f"nothing comes back, neither tunnel packets nor pings of {p.address}: the host is down or cut off"
        todo = f"look at the host {p.name}, and at the network between {ends}"
    return Hop(name, text, BROKEN, wanted, todo, Point.UNDERLAY)


def _path_mtu(e: Evidence, p: PeerFound, cut: bool) -> Hop:
    wanted = f"packets of {e.mtu} bytes pass"
    if not cut:
        return Hop(
            "path MTU",
            f"{e.full.answered} of {e.full.sent} of {e.full.size} bytes came back",
            OK,
            wanted,
            after=Point.UNDERLAY,
        )
    said = f" ({listed(e.full.errors, 2)})" if e.full.errors else ""
    most = f"packets above {p.path_mtu} bytes are lost" if p.path_mtu else f"packets of {e.full.size} bytes are lost"
    value = p.path_mtu or "what passes"
    todo = f"raise the MTU of the network to {p.address}, or set the mesh's `mtu` to {value}"
    return Hop("path MTU", f"{most}{said}", BROKEN, wanted, todo, Point.UNDERLAY)


def _destination(e: Evidence, p: PeerFound, reached: bool) -> Hop:
    name = f"destination on {p.name}"
    wanted = f"{e.target.address} answers"
    after = Point.UNDERLAY
    if e.small.answered or any(e.seen.get(point) for point in Point if point.endswith("back")):
        return Hop(name, f"{e.target.address} answers", OK, wanted, after=after)
    if not reached:
        return Hop(name, "no packet is known to have come this far", UNKNOWN, wanted, after=after)
    said = [error for error in e.small.errors if _of_peer(error, p)]
    unreachable = [error for error in said if "host unreachable" in error]
    refused = [error for error in said if "prohibited" in error or "port unreachable" in error]
    if unreachable:
        text = f"{p.name} says host unreachable: nothing there has {e.target.address}"
        return Hop(name, text, BROKEN, wanted, "the pod is gone, or its interface is down: look for it there", after)
    on_peer = f"on {p.name}: ovsmesh trace {e.target.address} {e.source.address}"
    if refused:
        name = f"filter of {p.name}"
        return Hop(name, f"it answers that this is {listed(refused, 1)}", BROKEN, wanted, on_peer, after)
    if p.unused_echo.answered or any("host unreachable" in error for error in p.unused_echo.errors):
        text = (
            f"{p.name} forwards, and {e.target.address} does not answer: a filter in it or before it, or no route back"
        )
        return Hop(name, text, BROKEN, wanted, on_peer, after)
    name = f"forwarding on {p.name}"
    text = f"{p.gateway} answers, and {p.name} forwards nothing to its pods: a filter (FORWARD), or ip_forward=0"
    return Hop(name, text, BROKEN, f"{p.name} forwards to {e.target.cidr}", on_peer, after)


# agents


def _peer_agent(p: PeerFound) -> Hop:
    name = f"agent of {p.name}"
    if p.agent == "unknown":
        return Hop(name, "can't be asked from here", UNKNOWN)
    if p.agent == "ok":
        return Hop(name, p.headline or "it answers", OK, "it runs")
    return Hop(name, p.agent, BROKEN, "it runs", f"on {p.name}: ovsmesh status")


def _own_agent(e: Evidence) -> Hop:
    name = f"agent of {e.self_name}"
    if not e.agent:
        return Hop(name, "it runs", OK, "it runs")
    return Hop(name, e.agent, BROKEN, "it runs", "start it: systemctl start ovsmesh-agent")


# all of it


def _trace(e: Evidence, found: Sequence[Hop], index: int | None, at: Point | None) -> Trace:
    way = f"{e.source} → {e.target}"
    broken = [n for n, hop in enumerate(found) if hop.verdict is BROKEN]
    if index is not None:
        hop = found[index]
        what = "some packets are lost" if _lossy(e.small) else "large packets stop" if e.small.answered else "stops"
        what = "stops" if at is None else what
        text = f"{way}: {what} at hop {index + 1}, {hop.name}: {hop.found}"
        return Trace(text, "stops", hop.todo, tuple(found), index + 1, e)
    if at is not None:
        return Trace(f"{way}: packets are lost, and it can't be told where", "unknown", "", tuple(found), None, e)
    trip = e.small.round_trip
    arrives = f"packets arrive{f', round trip {trip * 1000:.1f} ms' if trip is not None else ''}"
    if e.sent_from == "host for the pod":
        text = f"{way}: packets that this node sends in its place arrive; what its own meet here can't be seen"
        return Trace(text, "unknown", "", tuple(found), None, e)
    if broken:
        hop = found[broken[0]]
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        text = f"{way}: {arrives}, but hop {broken[0] + 1}, {hop.name}, is not as wanted{more}: {hop.found}"
        return Trace(text, "degraded", hop.todo, tuple(found), None, e)
    return Trace(f"{way}: {arrives}; all hops are as wanted", "arrives", "", tuple(found), None, e)
