"""`ovsmesh check`: the wiring of this node, and packets to every peer, now. It changes nothing and needs no agent."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
import time
from collections.abc import Collection, Mapping

from ovsmesh.agent import result
from ovsmesh.agent.options import Options, opened
from ovsmesh.cli import inspect
from ovsmesh.dataplane import desired
from ovsmesh.dataplane.node_report import astray
from ovsmesh.dataplane.report import ReconcileResult, Report
from ovsmesh.dataplane.types import KBR, OBR, FilterFound, Reach, State
from ovsmesh.errors import OvsmeshError, Problem, summary
from ovsmesh.linux.kernel import PodRoutes
from ovsmesh.linux.nft_trace import Filters, patterns
from ovsmesh.linux.ruleset import Query, remedied
from ovsmesh.mesh.types import Node
from ovsmesh.names import PROBE_MAGIC
from ovsmesh.probe.sender import Prober
from ovsmesh.probe.targets import Target, targets
from ovsmesh.reasons import IN_THE_WAY, Reason
from ovsmesh.state_dir import StateDir
from ovsmesh.text import instead

_RATE = 200.0
"""Probes a second: a thousand peers in some five seconds."""
_DEADLINE = 30.0
"""Seconds after which a peer that is still undecided is shown so."""
_LEAST = 3.0
"""Seconds of probing at least: one lost packet of a few shows up then."""


def check(options: Options, peer: str = "") -> Report:
    """Probe every peer, or the one that is named, and return the report of this node.

    Raises OvsmeshError where the mesh, the switch or the raw sockets can't be used: then nothing can be told.
    """
    source = inspect.usable(options)
    assert source.mesh is not None
    if peer and (peer == options.node or source.mesh.node(peer) is None):
        names = [node.name for node in source.mesh.nodes if node.name != options.node]
        raise OvsmeshError(f"--peer {peer}: this node has no such peer; {instead(peer, names)}")
    with opened(options, StateDir(options.state_dir)) as driver:
        found = result.look(driver, source, options.node)
        figures = driver.figures()
    if found.mesh is None or found.facts is None or found.have is None:
        raise OvsmeshError(summary(found.problems))
    wanted = targets(found.mesh, options.node, found.facts, found.have.dataplane)
    me = found.mesh.node(options.node)
    assert me is not None
    reach, refused = _probe({name: paths for name, paths in wanted.items() if peer in ("", name)}, found, me)
    found = dataclasses.replace(found, problems=(*refused, *found.problems))
    told = inspect.ask(options)
    context = inspect.context(options, told, figures)
    # these probes tell, whatever the agent's do
    agent = dataclasses.replace(context.agent, alive=True, heard=None)
    context = dataclasses.replace(context, agent=agent, reach=reach)
    return inspect.node_report(options, found, told, context, peer)


def _probe(
    wanted: Mapping[str, tuple[Target, ...]], found: ReconcileResult, me: Node
) -> tuple[dict[str, Reach], tuple[Problem, ...]]:
    """Return what became of the probes, and what on this host has dropped some: also those that peers' agents sent."""
    with contextlib.ExitStack() as ending:
        forms = [*patterns(4, PROBE_MAGIC, None, "v4 "), *patterns(6, PROBE_MAGIC, None, "v6 ")]
        filters = Filters(forms, [link for link in (KBR, OBR) if os.path.exists(f"/sys/class/net/{link}")])
        ending.callback(filters.close)
        try:
            routes = PodRoutes()
            ending.callback(routes.close)
            prober = Prober(routes.astray, _RATE)
        except OSError as error:
            raise OvsmeshError(f"no probe can be sent, as raw sockets can't be used: {error.strerror}") from None
        ending.callback(prober.close)
        prober.update(wanted)
        start = time.monotonic()
        least = start + _LEAST + len(wanted) / _RATE
        while (now := time.monotonic()) < start + _DEADLINE:
            undecided = any(one.state is State.UNPROBED for one in prober.results().values())
            if now >= least and not undecided:
                break
            select.select([prober.fd], [], [], 0.5 if undecided else max(0.0, least - now))
            prober.drain()
            filters.drain()
        refused = _refused(filters.found(), found)
        return prober.results(), (
            *refused,
            *(p for mark in filters.marks for p in _marked(mark, wanted, found, me, routes)),
        )


def _marked(
    mark: int, wanted: Collection[str], found: ReconcileResult, me: Node, routes: PodRoutes
) -> tuple[Problem, ...]:
    """Return where packets go with a mark that somebody's rules have given the probes, if not to kbr0."""
    mesh, facts = found.mesh, found.facts
    if mesh is None or facts is None:
        return ()
    peers = [node for node in mesh.nodes if node.name in wanted]
    with contextlib.suppress(OSError):
        bridge, own = socket.if_nametoindex(KBR), desired.gateways(me, facts)
        ways = routes.detours(bridge, own, peers, mesh.cluster_cidrs, mark=mark)
        marked = f"with the mark {mark:#x} that a rule here sets"
        # the marks were seen on packets that come in
        return astray(one._replace(why=f"{marked}, {one.why}") for one in ways if one.sender == "pods")
    return ()


def _refused(seen: FilterFound, found: ReconcileResult) -> tuple[Problem, ...]:
    """Return a problem for each rule that drops probes, but for those that are named already, and for rare losses."""
    lossy = any(hook.first > 1 and hook.last * 2 <= hook.first for hook in seen.hooks)
    certain = tuple(drop for drop in seen.drops if drop.certain and drop.chain[0])
    if not lossy or not certain or any(problem.reason in IN_THE_WAY for problem in found.problems):
        return ()
    ranges = found.mesh.cluster_cidrs if found.mesh else ()
    return tuple(
        Problem(Reason.PacketsRefused, f"probes are dropped by {drop.rule}, {drop.table}; {drop.todo}")
        for drop in remedied(dataclasses.replace(seen, drops=certain), Query((), (), ranges, None)).drops
    )
