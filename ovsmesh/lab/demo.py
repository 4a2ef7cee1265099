"""The demo: a mesh of five hosts, a ping from every pod to every pod, then faults while packets run.

A repair is timed by a stream of packets across the broken part, not by what the agent says of itself. What no agent
can repair, a cut in the network between, is timed until `ovsmesh status` names it.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from ovsmesh.lab import netns
from ovsmesh.lab.console import Console, Steps, failed, show_matrix, show_summary, taken_down
from ovsmesh.lab.faults import cut, fault, limit
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import LabError, wait_for
from ovsmesh.lab.ping import Outage, Pair, Prober, Track
from ovsmesh.names import OBR

_HOSTS, _PODS = 5, 2
_INTERVAL = 0.002
"""Seconds between two packets of a direction, and so the resolution of what is shown."""
_DEADLINE = 20.0
_CALM = 0.15
"""Seconds of packets before a fault, so that it meets traffic that passes."""
_DEAD = 0.5
"""Seconds that ovs-vswitchd stays dead before it is started again."""
_SMALL_MTU = 1400
"""Bytes of the largest packet that passes where the path MTU is cut."""
_WIDTH = 80


def play(name: str, out: Console) -> None:
    """Show the whole demo, from nothing to nothing. Exits with 1 when a ping failed.

    Raises LabError when a step fails.
    """
    start = time.monotonic()
    out.heading("ovsmesh: one flat network for the pods of many hosts")
    lab = Lab(_HOSTS, _PODS, name=name, step=Steps(out))
    with taken_down(out, lab):
        lab.up()
        bad = _Show(lab, out).all()
    out.print(f"[bold]{time.monotonic() - start:.0f} seconds in all.[/]")
    if bad:
        raise SystemExit(1)


class _Show:
    def __init__(self, lab: Lab, out: Console) -> None:
        self.lab, self.out = lab, out

    def all(self) -> bool:
        """Show everything. Return whether a ping of the first or the last matrix failed, or a plan was not empty."""
        out = self.out
        out.heading("peers of h1, from `ovsmesh status`")
        one, *others = self.lab.hosts
        self._times([(one, other) for other in others], lambda state: state == "ok")
        lines = one.ovsmesh("status").stdout.splitlines()
        out.print("\n".join(line for line in lines if re.match(r"PEER|h\d", line)), markup=False)
        out.heading("every pod pings every pod, round trips in ms")
        bad = self._matrix(first=True)
        out.heading(f"faults, with a packet every {_INTERVAL * 1000:g} ms both ways")
        out.print(f"[bold]{'':<52}{'cut off for':>17}{'lost':>9}[/]")
        out.print(f"[bold]{'':<52}{'median':>8}{'worst':>9}{'packets':>9}[/]")
        self._repeat("a GRE port deleted", self._delete_port)
        self._repeat("a route deleted", self._delete_route)
        self._repeat("the flow table emptied", self._empty_flows)
        self._restart_switch()
        self._join_and_leave()
        out.heading("faults of the network between hosts, until `ovsmesh status` says so")
        out.print(f"[bold]{'':<52}{'named':>8}{'over':>9}[/]")
        self._cut_network()
        out.heading("after all faults")
        plans = [host.ovsmesh("plan").returncode for host in self.lab.hosts]
        out.print(f"`ovsmesh plan`: nothing to change on {plans.count(0)} of {len(plans)} hosts")
        return self._matrix(first=False) or bad or any(plans)

    def _matrix(self, first: bool) -> bool:
        tracks = self.lab.ping_matrix(count=3)
        bad = any(map(failed, tracks))
        (show_matrix if first or bad else show_summary)(self.out, tracks)
        return bad

    # --- faults that one command makes

    def _repeat(self, what: str, fault: Callable[[Host, Host], Callable[[], object]]) -> None:
        """Make the fault once on each host, on its way to the next one."""
        cuts, lost = [], 0
        hosts = self.lab.hosts
        with self.out.status(what):
            for host, peer in zip(hosts, [*hosts[1:], hosts[0]], strict=True):
                outages = self._one(host, peer, fault)
                cuts.append(max((outage.seconds for outage in outages), default=0.0))
                lost += sum(outage.lost for outage in outages)
        self._line(f"{what}, on {len(hosts)} hosts", cuts, lost)

    def _one(self, host: Host, peer: Host, fault: Callable[[Host, Host], Callable[[], object]]) -> list[Outage]:
        pairs = self._both_ways(host, peer)
        with self.lab.stream(pairs, _INTERVAL) as stream:
            _flows(stream, time.time())
            time.sleep(_CALM)
            at = time.time()
            back = fault(host, peer)
            wait_for(f"{host.name} to be repaired", back, _DEADLINE, every=0.001, hint=f"see {host.agent_log}")
            _flows(stream, time.time())
        return [outage for track in stream.tracks for outage in track.outages(at)]

    def _both_ways(self, host: Host, peer: Host) -> list[Pair]:
        a, b = host.pods[0], peer.pods[0]
        return [self.lab.pair(a, b), self.lab.pair(b, a)]

    def _delete_port(self, host: Host, peer: Host) -> Callable[[], object]:
        port = f"gre-{peer.name}"
        host.ovs_vsctl("del-port", OBR, port)
        return lambda: host.ovs_vsctl(f"--timeout={_DEADLINE:.0f}", "wait-until", "Interface", port, "ofport>0") == ""

    def _delete_route(self, host: Host, peer: Host) -> Callable[[], object]:
        route = str(peer.pod_cidrs[0])
        netns.ip_batch([f"route del {route}"], host.ns)
        return lambda: host.run(["ip", "route", "show", route]).stdout.strip()

    def _empty_flows(self, host: Host, peer: Host) -> Callable[[], object]:
        before = len(host.ovs_ofctl("dump-flows", OBR).splitlines())
        host.ovs_ofctl("del-flows", OBR)
        return lambda: len(host.ovs_ofctl("dump-flows", OBR).splitlines()) == before

    # --- faults that the demo itself ends

    def _restart_switch(self) -> None:
        host, peer = self.lab.hosts[1:3]
        with self.lab.stream(self._both_ways(host, peer), _INTERVAL) as stream:
            _flows(stream, time.time())
            host.kill_vswitchd()
            # stays dead for a while, as until a supervisor starts it again
            time.sleep(_DEAD)
            started = time.time()
            host.start_vswitchd()
            running = time.time()
            _flows(stream, running)
        outages = [outage for track in stream.tracks for outage in track.outages(started - _DEAD)]
        ends = [max(0.0, outage.end - started) for outage in outages]
        lost = sum(outage.lost for outage in outages)
        self._line(f"ovs-vswitchd killed, started {_DEAD:g} s later", [max(ends, default=0.0)], lost)
        self._note(f"from its start, which itself takes {_ms(running - started)} until it has read its database")

    def _join_and_leave(self) -> None:
        lab = self.lab
        old = [host.node for host in lab.hosts]
        pods = [pod for host in lab.hosts for pod in host.pods]
        # the new host is ready, with its own copy of the mesh file; the others do not know it yet
        host = lab.prepare_host()
        own = host.state / "mesh.yaml"
        own.write_text(lab.mesh_text())
        host.start_agent(mesh=own)
        lab.converged(_DEADLINE, [host])
        host.plug()
        pairs = [lab.pair(pod, host.pods[0]) for pod in pods]
        with lab.stream(pairs, _INTERVAL * len(pairs) / 2) as stream:
            at = time.time()
            lab.write_mesh()
            _flows(stream, at)
            self._line("a sixth host joins", [max(_first(t, t.received, at) for t in stream.tracks)])
            self._note(f"from the mesh file's rename until all {len(pods)} pods reach the new host's")
            at = time.time()
            lab.write_mesh(old)
            if not stream.wait_refused(at, _DEADLINE):
                raise LabError(f"pods still reach {host.name} {_DEADLINE:g} s after it left the mesh")
        last = max(track.sent[number] for track in stream.tracks for number in track.received)
        self._line("a host leaves", [last - at])
        self._note("from the rename to the last packet through; then senders get “unreachable”")
        lab.remove_host(host.index)

    # --- faults that no agent can repair

    def _cut_network(self) -> None:
        """Cut GRE between two hosts, and the path MTU between two others, at once."""
        first, second, third, fourth = self.lab.hosts[:4]
        rules = {(first, second): cut(first, second), (third, fourth): limit(third, fourth, _SMALL_MTU)}
        with self.out.status("GRE cut, path MTU cut"):
            with fault(self.lab, *(rule for some in rules.values() for rule in some)):
                named = self._times(rules, lambda state: state not in ("ok", "lossy"))
                said = [host.ovsmesh("status").stdout.splitlines() for host, _ in rules]
            over = self._times(rules, lambda state: state == "ok")
        what = ("GRE cut between {} and {}", f"packets above {_SMALL_MTU} bytes lost between {{}} and {{}}")
        for text, pair, lines in zip(what, rules, said, strict=True):
            shown = text.format(*(host.name for host in pair))
            self.out.print(f"[green]✓[/] {shown:<50}{_ms(named[pair]):>8}{_ms(over[pair]):>9}")
            for line in [*lines[:1], *[line for line in lines if line.startswith("! ") and pair[1].name in line][:1]]:
                self._note(line if len(line) <= _WIDTH - 2 else f"{line[: _WIDTH - 3]}…")

    def _times(self, pairs: Iterable[tuple[Host, Host]], seen: Callable[[str], bool]) -> dict[tuple[Host, Host], float]:
        """Return after how many seconds from now the agent of each pair's first host has said so of the second."""
        at, found = time.monotonic(), dict[tuple[Host, Host], float]()
        waiting = list(pairs)

        def all_said() -> bool:
            for host, peer in [pair for pair in waiting if pair not in found]:
                _, body = host.http("/status.json")
                peers = json.loads(body).get("peers", ()) if body.startswith("{") else ()
                if any(one["name"] == peer.name and seen(one["state"]) for one in peers):
                    found[host, peer] = time.monotonic() - at
            return len(found) == len(waiting)

        wait_for("status to say so", all_said, _DEADLINE * 2, every=0.05)
        return found

    # --- lines

    def _line(self, what: str, cuts: Sequence[float], lost: int | None = None) -> None:
        median, worst = statistics.median(cuts), max(cuts)
        mark = "[green]✓[/]" if worst < 1 else "[yellow]•[/]"
        times = f"{_ms(median):>8}{_ms(worst):>9}" if len(cuts) > 1 else f"{_ms(worst):>8}{'':>9}"
        self.out.print(f"{mark} {what:<50}{times}{'' if lost is None else lost:>9}".rstrip())

    def _note(self, text: str) -> None:
        self.out.print(f"  [dim]{text}[/]")


def _ms(seconds: float) -> str:
    if seconds < _INTERVAL:
        return f"< {_INTERVAL * 1000:g} ms"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _first(track: Track, came_back: Mapping[int, float], at: float) -> float:
    """Return the seconds from `at` to the sending of the first packet after it that got this kind of answer."""
    return min((track.sent[number] for number in came_back if track.sent[number] >= at), default=time.time()) - at


def _flows(stream: Prober, since: float) -> None:
    if not stream.wait(since, _DEADLINE, run=10):
        dead = ", ".join(f"{t.pair.source} → {t.pair.target}" for t in stream.tracks if not t.answered_since(since, 10))
        raise LabError(f"no packets get through {_DEADLINE:g} s later: {dead}; the logs above say why")
