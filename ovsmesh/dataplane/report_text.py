"""Write a report as plain text: what is worst first, then this node, then a line for each peer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ovsmesh.dataplane.report import NOT_REACHED, Peer, Report, Self, Traffic
from ovsmesh.dataplane.types import Reach, State
from ovsmesh.errors import Problem, grouped
from ovsmesh.reasons import Reason
from ovsmesh.text import age, clock, listed, printable, some, timestamp

_OF_THE_AGENT = (Reason.AgentDown, Reason.AgentHung, Reason.AgentOutdated, Reason.AgentNotReported)
"""Reasons of problems that a headline states."""

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


def problem_lines(problems: Iterable[Problem]) -> list[str]:
    """Return a line for each kind of problem, the worst first: "! " before what is wrong, "note: " before the rest."""
    worst_first = sorted(problems, key=_is_note)
    wrong = [f"! {line}" for line in grouped(p for p in worst_first if not _is_note(p))]
    # what a note is about in the code's words (its field) is no help
    return wrong + [f"note: {p.message if not p.node else p}" for p in worst_first if _is_note(p)]


def _is_note(problem: Problem) -> bool:
    return not problem.wrong


def _some(lines: Iterable[str]) -> list[str]:
    return some(dict.fromkeys(lines), _MOST)


def _problems(report: Report) -> Iterator[str]:
    for problem in report.problems:
        if problem.reason in _OF_THE_AGENT and problem.reason is not Reason.AgentNotReported:
            yield f"! {problem.reason.meaning} {problem.reason.remedy.replace('`', '')}"
    # what the headline says is not said again
    rest = [p for p in report.problems if p.reason not in _OF_THE_AGENT and str(p) not in report.headline]
    lines = problem_lines(p for p in rest if not _is_note(p))
    yield from _some(lines)
    blind = any(problem.fatal for problem in report.problems if problem.reason not in _OF_THE_AGENT)
    bad = [p for p in report.peers if p.state == "missing" or p.state in NOT_REACHED]
    bad += [p for p in report.peers if p.state == "unknown" and not blind]
    causes: dict[tuple[str, ...], list[str]] = {}
    for peer in bad:
        causes.setdefault(peer.missing, []).append(peer.name)
    yield from _some(f"! {listed(names, 3)}: {listed(why, 3, '; ')}" for why, names in causes.items() if why)
    shown = " ".join([report.headline, *lines, *(line for peer in bad for line in peer.missing)])
    notes = problem_lines(p for p in rest if _is_note(p))
    yield from _some(
        f"! in the way: {detail}" for detail in report.unmanaged if detail not in shown and detail not in "".join(notes)
    )
    if not bad:
        # else what is pending is shown with its peer
        yield from _some(line for line in report.pending if line[0] != "=")
    yield from _some(notes)


def _about(me: Self, now: float) -> Iterator[tuple[str, str]]:
    key = "" if me.key is None else f" key {me.key}"
    yield "node", f"{me.name} {me.address} {me.encapsulation}{key}".rstrip()
    if me.pod_cidrs:
        pairs = zip(me.pod_cidrs, me.gateways, strict=True)
        yield "pod CIDRs", ", ".join(f"{cidr} (gateway {gateway})" for cidr, gateway in pairs)
        yield "MTU", f"{me.mtu} ({me.mtu_from})"
        yield "Open vSwitch", f"{me.ovs_version or 'version unknown'}, datapath {me.datapath_type}"
    if me.forwarding:
        yield "forwards", me.forwarding
    if me.cni is not None:
        yield "CNI", str(me.cni)
    if me.docker:
        yield "Docker", me.docker
    yield "agent", _agent(me, now)
    old = f", read {age(now - me.mesh_since)} ago" if me.mesh_since is not None else ""
    good = "" if me.mesh_current else " (the last known good one: its source can't be used now)"
    if me.mesh_from or old:
        digest = f", digest {me.mesh_digest}" if me.mesh_digest else ""
        nobody = "" if me.agent_since is not None else " by this command: no agent has it in force"
        yield "mesh", f"{me.mesh_from or 'mesh'}{digest}{old}{nobody}{good}"


def _agent(me: Self, now: float) -> str:
    last = f"; last report {age(now - me.agent_heard)} ago, at {clock(me.agent_heard, now)}" if me.agent_heard else ""
    if me.agent_since is None:
        return f"not running{last or '; none has reported here'}"
    if not me.agent_running:
        return f"{me.agent_version} gives no report now{last}".strip()
    return f"{me.agent_version} running for {age(now - me.agent_since)} (since {timestamp(me.agent_since)})".strip()


_HEAD = ["PEER", "ADDRESS", "POD CIDRS", "STATE", "RTT", "LOSS", "MTU", "RX", "TX", "ERRORS"]


def _row(peer: Peer, mtu: int) -> list[str]:
    traffic, found = peer.traffic or Traffic(), peer.reach or Reach()
    if found.state is State.UNPROBED:
        # too few probes to say anything
        found = Reach()
    passes = found.path_mtu or (mtu if peer.state == State.OK else None)
    return [
        peer.name,
        peer.address or "-",
        ",".join(peer.pod_cidrs) or "-",
        peer.state,
        "-" if found.round_trip is None else f"{found.round_trip * 1000:.1f} ms",
        "-" if found.loss is None else f"{found.loss:.0%}",
        _number(passes),
        *(_number(n) for n in (traffic.rx_packets, traffic.tx_packets, traffic.errors)),
    ]


def _number(value: int | None) -> str:
    """Return a number in five characters at most, as in 12.3k; "-" where it is not known."""
    if value is None:
        return "-"
    if value < 10000:
        return str(value)
    size, unit = next((size, unit) for size, unit in _UNITS if value >= size)
    short = value / size
    return f"{short:.0f}{unit}" if short >= 100 else f"{short:.1f}{unit}"


_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def render_text(report: Report) -> str:
    """Return the report for a terminal or a pipe; it ends with a newline."""
    lines = [report.headline, *_problems(report), ""]
    lines += table(list(_about(report.self, report.time)), "  ")
    conditions = [(c.type, c.status, c.reason, c.message) for c in report.conditions]
    lines += ["", *table([("CONDITION", "STATUS", "REASON", "MESSAGE"), *conditions])]
    if report.peers:
        rows = [_HEAD, *(_row(peer, report.self.mtu) for peer in report.peers)]
        lines += ["", *table(rows, right=frozenset(range(4, len(_HEAD))))]
    return "\n".join(map(printable, lines)) + "\n"
