"""Faults between hosts: seconds until the agents' reports say so, with the right cause, and until they say it is over.

Each fault has 20 tries, each at another pair of hosts, by agents that are new: a path that was bad before has to be
well for longer each time. A report is made again once a second, which is part of each figure.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from benchlib.figures import Figure
from benchlib.testbed import Plan
from ovsmesh.lab import netns
from ovsmesh.lab.faults import cut, delay, fault, limit, lose, tunnel
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import LabError

_GOAL = 10.0
_DEADLINE = 90.0
_EVERY = 0.05
_MTU = 1400
_DELAY = 0.04

Pair = tuple[Host, Host]
Seen = Callable[[Pair], bool]
Fault = Callable[[Sequence[Pair]], AbstractContextManager[Any]]


def bench(plan: Plan) -> Iterator[Figure]:
    """Measure how fast each kind of fault is seen, and how fast its end."""
    with Lab(4 if plan.quick else 7, 1, ephemeral=True) as lab:
        pairs = _rounds(lab.hosts, plan.tries(20, 3))
        towards = [[(other, host) for other in lab.hosts if other != host] for host in lab.hosts]
        kinds: list[tuple[str, Fault, Seen, list[list[Pair]]]] = [
            ("GRE cut both ways", lambda some: _dropped(lab, some, cut), _unreachable, pairs),
            ("GRE cut one way, named by both ends", lambda some: _dropped(lab, some, _one_way), _one_sided, pairs),
            (f"path MTU {_MTU}", lambda some: _dropped(lab, some, lambda a, b: limit(a, b, _MTU)), _small, pairs),
            ("30 % loss one way", lambda some: _dropped(lab, some, lambda a, b: [lose(a, b, 30)]), _lossy, pairs),
            (f"{_DELAY * 1000:.0f} ms more delay, in the round trip", lambda some: _delayed(lab, some), _slow, towards),
            ("peer's ovs-vswitchd killed", _switch_dead, _unreachable, towards),
            ("peer powered off", lambda some: _off(lab, some[0][1]), _unreachable, towards),
            ("peer's FORWARD policy DROP", _not_forwarding, _not_forwarded, towards),
        ]
        for name, make, seen, rounds in kinds:
            _fresh(lab)
            found: list[float] = []
            cleared: list[float] = []
            for some in rounds:
                if len(found) >= plan.tries(20, 3):
                    break
                if seen is _slow:
                    _times(some, _quick_again, f"before: {name}")
                with make(some):
                    found += _times(some, seen, name)
                cleared += _times(some, _quick_again if seen is _slow else _well, f"the end of: {name}")
            plan.progress(f"  {name}: seen in {max(found):.1f} s at most, its end in {max(cleared):.1f} s")
            yield Figure("detect", f"{name}: until status says so", "s", tuple(found), bound=_GOAL, bound_on_max=True)
            yield Figure(
                "detect", "  until it says that it is over", "s", tuple(cleared), bound=_GOAL, bound_on_max=True
            )


def _rounds(hosts: Sequence[Host], wanted: int) -> list[list[Pair]]:
    """Return at least `wanted` pairs, each once, in rounds in which each host is in one pair at most."""
    ring: list[Host | None] = [*hosts, *([None] if len(hosts) % 2 else [])]
    rounds: list[list[Pair]] = []
    while sum(map(len, rounds)) < wanted and len(rounds) < len(ring) - 1:
        halves = zip(ring[: len(ring) // 2], reversed(ring), strict=False)
        rounds.append([(a, b) for a, b in halves if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds


def _fresh(lab: Lab) -> None:
    for host in lab.hosts:
        host.stop_agent()
        host.start_agent()
    pairs = [(a, b) for a in lab.hosts for b in lab.hosts if a != b]
    netns.wait_for("all peers to be ok", lambda: all(map(_well, pairs)), _DEADLINE, every=0.2)


def _times(pairs: Iterable[Pair], seen: Seen, what: str) -> list[float]:
    """Return after how many seconds from now each pair was seen so."""
    start = time.monotonic()
    waiting, times = list(pairs), []
    while waiting:
        for pair in list(waiting):
            if seen(pair):
                times.append(time.monotonic() - start)
                waiting.remove(pair)
        if time.monotonic() - start > _DEADLINE:
            said = [f"{a.name} of {b.name}: {_peer(a, b)}" for a, b in waiting]
            raise LabError(f"{what}: not seen after {_DEADLINE:g} s; {'; '.join(said)}")
        time.sleep(_EVERY)
    return times


# What the agents say


def _peer(host: Host, peer: Host) -> dict[str, Any]:
    status, body = host.http("/status.json")
    peers = json.loads(body).get("peers", ()) if status == 200 else ()
    found: dict[str, Any] = next((one for one in peers if one["name"] == peer.name), {})
    return found


def _is(host: Host, peer: Host, state: str, *words: str) -> bool:
    found = _peer(host, peer)
    return found.get("state") == state and all(word in " ".join(found.get("missing", ())) for word in words)


def _well(pair: Pair) -> bool:
    return _is(*pair, "ok")


def _unreachable(pair: Pair) -> bool:
    return _is(*pair, "unreachable", "nothing arrives from it")


def _one_sided(pair: Pair) -> bool:
    sender, receiver = pair
    named = f"from {sender.address} to {receiver.address}"
    return _is(sender, receiver, "unreachable", "its packets arrive here", named) and _is(
        receiver, sender, "unreachable", "nothing arrives from it"
    )


def _small(pair: Pair) -> bool:
    return _is(*pair, "small packets only") and _peer(*pair).get("reach", {}).get("pathMtu") == _MTU - 38


def _lossy(pair: Pair) -> bool:
    return _is(*pair, "lossy")


def _slow(pair: Pair) -> bool:
    return bool(_peer(*pair).get("reach", {}).get("roundTrip", 0.0) > _DELAY * 0.75)


def _quick_again(pair: Pair) -> bool:
    return _well(pair) and not _slow(pair)


def _not_forwarded(pair: Pair) -> bool:
    return _is(*pair, "not forwarded", "FORWARD")


# The faults


def _one_way(sender: Host, receiver: Host) -> list[str]:
    return [f"{tunnel(sender, receiver)} drop"]


def _dropped(lab: Lab, pairs: Sequence[Pair], rules: Callable[[Host, Host], list[str]]) -> AbstractContextManager[Any]:
    return fault(lab, *(rule for pair in pairs for rule in rules(*pair)))


def _delayed(lab: Lab, pairs: Sequence[Pair]) -> AbstractContextManager[Any]:
    return delay(lab, pairs[0][1], _DELAY)


@contextmanager
def _switch_dead(pairs: Sequence[Pair]) -> Iterator[None]:
    host = pairs[0][1]
    host.kill_vswitchd()
    try:
        yield
    finally:
        host.start_vswitchd()


@contextmanager
def _off(lab: Lab, host: Host) -> Iterator[None]:
    """Take a host off the underlay, which is all that others see of a power switch."""
    netns.ip_batch([f"link set u{host.index} down"], lab.hub)
    try:
        yield
    finally:
        netns.ip_batch([f"link set u{host.index} up"], lab.hub)


@contextmanager
def _not_forwarding(pairs: Sequence[Pair]) -> Iterator[None]:
    """Have a host's FORWARD chain drop, where no agent adds its rules to it."""
    host = pairs[0][1]
    with ExitStack() as undo:
        host.stop_agent()
        undo.callback(host.start_agent)
        host.run(["iptables", "-P", "FORWARD", "DROP"])
        undo.callback(host.run, ["iptables", "-P", "FORWARD", "ACCEPT"])
        yield
