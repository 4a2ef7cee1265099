"""`ovsmesh bootstrap`: check a host, print its part of the mesh as a shell script, wait for its agent."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

from ovsmesh.agent.driver import Driver
from ovsmesh.agent.options import Options, opened
from ovsmesh.agent.result import compare
from ovsmesh.cli import check as probed
from ovsmesh.cli import inspect, preflight
from ovsmesh.cli.preflight import FAIL, OK, WARN, Check
from ovsmesh.dataplane import desired, shell_script
from ovsmesh.dataplane.report import Peer
from ovsmesh.dataplane.types import Facts, State
from ovsmesh.errors import OvsmeshError, Problem, grouped, summary
from ovsmesh.linux.kernel import kernel_datapath
from ovsmesh.mesh.source import Snapshot
from ovsmesh.mesh.types import Mesh, Node
from ovsmesh.ovs.idl import run_dir
from ovsmesh.probe import icmp
from ovsmesh.reasons import IN_THE_WAY, Reason
from ovsmesh.state_dir import StateDir
from ovsmesh.text import counted, listed

_DEFAULT_RUN_DIRS = ("/var/run/openvswitch", "/run/openvswitch")
_POLL = 0.5
_PEERS = 10.0
"""Seconds that peers have to answer, once the agent has converged: they may have been started at the same time."""
_FILTERS = (Reason.FilterUnavailable, Reason.FilterFailed)
"""Problems of the observation that the script has too."""
_MTU = (Reason.MTUTooHigh, Reason.MTUTooLow)
_COVERED = (Reason.TunnelAddressMissing, Reason.DatapathMissing)
"""Problems that other checks report."""


def _mesh(options: Options) -> tuple[Snapshot, Mesh, Node]:
    """Return what the file holds, its mesh, and this node in it. Raises OvsmeshError when it has no such node."""
    found = inspect.snapshot(options)
    me = found.mesh.node(options.node) if found.mesh else None
    if found.mesh is None or me is None or not found.confirmed:
        raise OvsmeshError(summary(found.problems) or f"{options.mesh}: has no node {options.node}")
    return found, found.mesh, me


def _open(options: Options) -> AbstractContextManager[Driver]:
    # the script does not plug containers in
    bare = dataclasses.replace(options, cni_dir="", docker="off")
    return opened(bare, StateDir(options.state_dir))


def script(options: Options) -> tuple[str, tuple[Problem, ...]]:
    """Return this host's part of the mesh as a shell script, and its problems. Raises OvsmeshError."""
    source, wanted, me = _mesh(options)
    with _open(options) as driver:
        found = compare(driver, wanted, me.name)
    problems = (*source.problems, *found.refused)
    notes = [
        f"containers get an address of {', '.join(map(str, me.pod_cidrs))}, the first one as gateway, "
        f"and MTU {desired.pod_mtu(wanted, me, found.facts)}",
        *map(str, (*problems, *(p for p in found.have.problems if p.reason in _FILTERS))),
    ]
    where = str(run_dir(options.ovsdb))
    title = f"node {me.name}, tunnel address {me.address}, of the mesh in {options.mesh}"
    return shell_script.render(found.want, title, notes, "" if where in _DEFAULT_RUN_DIRS else where), problems


def check(options: Options) -> list[Check]:
    """Check everything that a node needs."""
    found = [*preflight.kernel(), *preflight.tools()]
    wanted: Mesh | None = None
    try:
        source, wanted, me = _mesh(options)
    except OvsmeshError as error:
        found.append(Check(FAIL, "mesh", str(error)))
    ovsdb = options.ovsdb
    with _open(options) as driver:
        datapath, up, version = kernel_datapath(), driver.database_up, driver.figures().version
        if wanted is None:
            found += preflight.switch(up, version, ovsdb, datapath, not datapath, "gre")
            return found
        here = compare(driver, wanted, me.name)
    facts, unmanaged = here.facts, here.have.unmanaged if up else ()
    found += [Check(FAIL, "mesh", line) for line in grouped(p for p in source.problems if p.fatal)]
    found += [Check(WARN, "mesh", line) for line in grouped(p for p in source.problems if not p.fatal)]
    found += [Check(OK, "mesh", f"{len(wanted.nodes)} nodes, this one is {me.name}")] if not source.problems else []
    carried = up and facts.datapath_type == "netdev" and facts.datapath_carried
    found += preflight.switch(up, version, ovsdb, datapath, carried, wanted.encapsulation)
    found += _underlay(wanted, me, facts, here.refused)
    found += preflight.ranges(wanted, preflight.routes())
    found += [Check(FAIL, "in the way", str(p)) for p in (*here.beside, *here.have.problems) if p.reason in IN_THE_WAY]
    found += [Check(FAIL, "conflict", f.detail) for f in unmanaged if f.kind in ("links", "bridges")]
    found += _docker(options)
    if facts.tunnel_address:
        found += preflight.tunnels(wanted, me)
        found.append(_peers(options, wanted, me))
    return found


def _docker(options: Options) -> Iterator[Check]:
    """Check whether the Docker of this host is one that `--docker replace` can move, before anything is touched."""
    if options.docker != "replace":
        return
    with opened(options, StateDir(options.state_dir)) as driver:
        why = driver.docker.refusal() if driver.docker else ""
    yield Check(FAIL, "docker", why) if why else Check(OK, "docker", "nothing is seen that keeps it from kbr0")


def exit_code(checks: Iterable[Check]) -> int:
    """Return the exit status: 0 the host can be a node, 1 it can't, 2 it can and peers do not answer."""
    bad = {check.name for check in checks if check.state == FAIL}
    return 0 if not bad else 2 if bad == {"peers"} else 1


def _underlay(mesh: Mesh, me: Node, facts: Facts, refused: Iterable[Problem]) -> Iterator[Check]:
    if not facts.tunnel_address:
        yield Check(FAIL, "address", f"{me.address} is on no link of this host; assign it, or correct the mesh")
        return
    mtu = desired.pod_mtu(mesh, me, facts)
    yield Check(OK, "address", f"{me.address} is on this host")
    problems = [p for p in refused if p.reason not in _COVERED]
    yield from (Check(FAIL if p.fatal else WARN, "mtu" if p.reason in _MTU else "mesh", str(p)) for p in problems)
    if not any(p.reason in _MTU for p in problems):
        yield Check(OK, "mtu", f"{facts.underlay_mtu or 'unknown'} on the underlay, {mtu} for containers")


def await_converged(options: Options, deadline: float) -> tuple[list[str], int]:
    """Wait until an agent runs and has nothing left to do, and until all peers answer. Return what is said, and how.

    0: all peers answer, through the tunnel and the peer's forwarding path. 2: the agent has converged, and a peer does
    not answer within ten seconds more, or something on this host drops packets of the mesh. 1: after `deadline` seconds
    something is left to do.
    """
    end = time.monotonic() + deadline
    while True:
        left = _left(options)
        if not left:
            break
        if time.monotonic() > end:
            return [f"not converged after {deadline:g} s:", *(f"  {line}" for line in left)], 1
        # neither the start of an agent nor an empty plan sends an event to other processes
        time.sleep(_POLL)
    end = min(end, time.monotonic() + _PEERS)
    while True:
        report = probed.check(options)
        if all(peer.state == State.OK for peer in report.peers) or time.monotonic() > end:
            break
    lines = [f"{report.self.name}: converged, {counted(len(report.peers), 'peer')}"]
    lines += [f"  {peer.name} {peer.address}: {_answer(peer)}" for peer in report.peers]
    good = [peer for peer in report.peers if peer.state == State.OK]
    if report.peers and not good:
        lines.append(
            "no peer answers. If this is the first host of the mesh, that is as it should be: run `ovsmesh check` once "
            "another one runs"
        )
    lost = [f"  {problem}" for problem in report.problems if problem.reason in IN_THE_WAY]
    return [*lines, *lost], 0 if len(good) == len(report.peers) and not lost else 2


def _answer(peer: Peer) -> str:
    trip = peer.reach.round_trip if peer.reach else None
    if peer.state == State.OK:
        return "answers" if trip is None else f"answers in {trip * 1000:.1f} ms"
    return f"{peer.state}: {'; '.join(peer.missing)}" if peer.missing else peer.state


def _peers(options: Options, wanted: Mesh, me: Node) -> Check:
    """Check whether the peers answer: through the tunnel where an agent runs, else to their tunnel address."""
    peers = [node for node in wanted.nodes if node.name != me.name]
    if not peers:
        return Check(OK, "peers", "none: this is the only node of the mesh")
    if StateDir(options.state_dir).held():
        found = {peer.name: _answer(peer) for peer in probed.check(options).peers if peer.state != State.OK}
        silent = [f"{name} ({why})" for name, why in found.items()]
        good = f"all {len(peers)} answer through the tunnel" if len(peers) > 1 else f"{peers[0].name} answers"
        if not silent:
            return Check(OK, "peers", good)
        return Check(FAIL, "peers", f"{len(silent)} of {len(peers)} do not answer: {listed(silent, 5, '; ')}")
    answers = icmp.ping(str(node.address) for node in peers)
    silent = [f"{node.name} {node.address}" for node in peers if answers[str(node.address)] is None]
    later = "whether packets get through the tunnels shows once the agent runs"
    if not silent:
        return Check(OK, "peers", f"{len(peers)} of {len(peers)} hosts answer a ping; {later}")
    text = f"{len(silent)} of {len(peers)} hosts do not answer a ping to their tunnel address: {listed(silent, 5)}"
    if len(silent) == len(peers):
        why = "is the underlay connected? If this is the first host, or ICMP is blocked, it can't be told yet"
        return Check(FAIL, "peers", f"{text}; {why}")
    return Check(WARN, "peers", f"{text}; {later}")


def _left(options: Options) -> list[str]:
    if not StateDir(options.state_dir).held():
        return [f"no agent runs with the state directory {options.state_dir}; journalctl -u ovsmesh-agent"]
    found, unclear = inspect.look(options)
    if found.converged and not unclear:
        return []
    return [*found.plan.lines(), *(str(p) for p in found.problems if p.fatal)] or ["something cannot be observed yet"]
