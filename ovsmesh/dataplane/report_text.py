"""Write a report as plain text: what is worst first, then this node, then a line for each peer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ovsmesh.dataplane.report import NOT_REACHED, Peer, Report, Self, age, timestamp
from ovsmesh.text import listed, printable, some

_MOST = 8
"""Lines about one kind of problem, before "and N more": the table has all peers, JSON has everything."""


def table(rows: Sequence[Sequence[str]], indent: str = "", right: frozenset[int] = frozenset()) -> Iterator[str]:
    """Yield rows as aligned lines; columns in `right` are aligned to the right."""
    if not rows:
        return
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        cells = [c.rjust(w) if n in right else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True))]
        yield (indent + "  ".join(cells)).rstrip()


def _some(lines: Iterable[str]) -> list[str]:
    return some(dict.fromkeys(lines), _MOST)


def _problems(report: Report) -> Iterator[str]:
    lines = [f"! {problem}" for problem in sorted(report.problems, key=lambda p: not p.fatal)]
    yield from _some(lines)
    named = " ".join(lines)
    bad = [peer for peer in report.peers if peer.state in ("missing", "unknown") or peer.state in NOT_REACHED]
    causes: dict[tuple[str, ...], list[str]] = {}
    for peer in bad:
        causes.setdefault(peer.missing, []).append(peer.name)
    yield from _some(f"! {listed(names, 3)}: {listed(why, 3, '; ')}" for why, names in causes.items())
    shown = " ".join(line for peer in bad for line in peer.missing)
    yield from _some(f"! in the way: {detail}" for detail in report.unmanaged if detail not in shown + named)
    if not bad:
        # else what is pending is shown with its peer
        yield from _some(line for line in report.pending if line[0] != "=")


def _about(me: Self, now: float) -> Iterator[tuple[str, str]]:
    key = "" if me.key is None else f" key {me.key}"
    yield "node", f"{me.name} {me.address} {me.encapsulation}{key}".rstrip()
    if me.pod_cidrs:
        pairs = zip(me.pod_cidrs, me.gateways, strict=True)
        yield "pod CIDRs", ", ".join(f"{cidr} (gateway {gateway})" for cidr, gateway in pairs)
        yield "MTU", f"{me.mtu} ({me.mtu_from})"
        yield "Open vSwitch", f"{me.ovs_version or 'version unknown'}, datapath {me.datapath_type}"
    if me.cni is not None:
        yield "CNI", str(me.cni)
    if me.docker:
        yield "Docker", me.docker
    if me.agent_since is None:
        yield "agent", "not running: nothing is repaired or updated"
    else:
        since = f"running for {age(now - me.agent_since)} (since {timestamp(me.agent_since)})"
        yield "agent", " ".join(filter(None, [me.agent_version, since]))
    old = f", read {age(now - me.mesh_since)} ago" if me.mesh_since is not None else ""
    good = "" if me.mesh_current else " (the last known good one: its source can't be used now)"
    if me.mesh_from or old:
        digest = f", digest {me.mesh_digest}" if me.mesh_digest else ""
        yield "mesh", f"{me.mesh_from or 'mesh'}{digest}{old}{good}"


def _row(peer: Peer, now: float) -> list[str]:
    traffic = peer.traffic
    counted = (traffic.rx_packets, traffic.tx_packets, traffic.errors) if traffic else (None,) * 3
    numbers = ["-" if n is None else str(n) for n in counted]
    changed = age(now - peer.last_change) if peer.last_change is not None else "-"
    state = peer.state if not peer.missing or peer.state in NOT_REACHED else f"{peer.state}: {_first(peer.missing)}"
    cidrs = ",".join(peer.pod_cidrs) or "-"
    return [peer.name, peer.address or "-", cidrs, peer.port or "-", *numbers, changed, *_reach(peer), state]


def _reach(peer: Peer) -> list[str]:
    """Return round trip, loss and path MTU; nothing where nobody probes."""
    found = peer.reach
    if found is None:
        return []
    trip = "-" if found.round_trip is None else f"{found.round_trip * 1000:.1f} ms"
    loss = "-" if found.loss is None else f"{found.loss:.0%}"
    return [trip, loss, "-" if found.path_mtu is None else str(found.path_mtu)]


def _first(missing: tuple[str, ...]) -> str:
    return missing[0] + (f" (+{len(missing) - 1})" if len(missing) > 1 else "")


def render_text(report: Report) -> str:
    """Return the report for a terminal or a pipe; it ends with a newline."""
    lines = [report.headline, *_problems(report), ""]
    lines += table(list(_about(report.self, report.time)), "  ")
    conditions = [(c.type, c.status, c.reason, c.message) for c in report.conditions]
    lines += ["", *table([("CONDITION", "STATUS", "REASON", "MESSAGE"), *conditions])]
    if report.peers:
        reach = ["RTT", "LOSS", "PATH MTU"] if any(peer.reach for peer in report.peers) else []
        head = ["PEER", "ADDRESS", "POD CIDRS", "PORT", "RX", "TX", "ERRORS", "CHANGED", *reach, "STATE"]
        rows = [head, *(_row(peer, report.time) for peer in report.peers)]
        lines += ["", *table(rows, right=frozenset(range(4, len(head) - 1)))]
    return "\n".join(map(printable, lines)) + "\n"
