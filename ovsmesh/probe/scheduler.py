"""Which path is probed when: every peer in turn, within a fixed budget of packets.

Up to a hundred peers are probed at least every five seconds each; above that the budget is shared, so each waits
longer. Quick probes go first, and regular ones keep half of the budget while both wait: nobody is starved.
Nothing here takes longer the more paths there are, except a change of the mesh. Times are seconds on a monotonic
clock and come as arguments; nothing is sent here.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

from ovsmesh.dataplane.types import Reach, State
from ovsmesh.probe.path import Path, Probe

RATE = 20.0
"""Probes a second, all together."""
SHORTEST, LONGEST_OF_FEW = 0.5, 5.0
"""Seconds between two regular probes of a peer: with few peers, and with a hundred."""
_BURST = 20.0
_TICK, _TICK_OF_MANY, _QUICK_TICK = 0.25, 0.5, 0.05
"""Seconds between wake-ups for regular probes and their losses, up to a hundred peers and above, and for the losses of
others. A wake-up costs more than a probe, and packets that leave together wait for each other."""
_SLACK = 0.02
"""Seconds that a probe may count as lost early, so that its end falls on the same tick as its sending."""
_EPSILON = 1e-3
_ONE = 1.0 - 1e-6
"""A whole token, as far as floating point tells."""

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class Wanted(NamedTuple):
    """A path to probe: bytes of a full packet, and whether this node's switch lets loops in."""

    size: int
    let_in: bool = True


class Due(NamedTuple, Generic[Key]):
    """A probe to send now, and the path that it is for."""

    key: Key
    probe: Probe


class _Timers(Generic[Key]):
    """Keys by time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Key]] = []
        self._count = 0

    def add(self, at: float, key: Key) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, key))

    def next(self) -> float:
        return self._heap[0][0] if self._heap else math.inf

    def pop(self, now: float) -> Key | None:
        """Return the first key whose time has come."""
        return heapq.heappop(self._heap)[2] if self._heap and self._heap[0][0] <= now else None


class Scheduler(Generic[Key]):
    """All paths of a node. Keys are the caller's; `groups` of keys (a peer's families) share one turn."""

    def __init__(self, now: float, rate: float = RATE) -> None:
        """Make an empty one. `rate` is the budget in probes a second."""
        self._rate = rate
        self._paths: dict[Key, Path] = {}
        self._groups: dict[Hashable, deque[Key]] = {}
        self._mtus: dict[Key, int | None] | None = None
        """What `path_mtus` returns, until that changes."""
        self._theirs: dict[Hashable, int] = {}
        """Group → MTU of the peer's pods in bytes, where it has said so."""
        self._regulars: _Timers[Hashable] = _Timers()
        self._in_turn: set[Hashable] = set()
        """What is in `_regulars`: each group once, and those that left until their time comes."""
        self._quicks: _Timers[Key] = _Timers()
        self._queued: set[Key] = set()
        """What is in `_quicks`: each path once."""
        self._expiries: _Timers[Key] = _Timers()
        self._hurried: set[Key] = set()
        self._tokens, self._filled = _BURST, now
        self._quick_last = False
        self.sent = self.lost = 0
        """Probes of all paths since the start, those of peers that left too."""
        self.changed = False
        """Whether a path has changed its state or its path MTU; the caller sets it back."""

    def update(self, wanted: Mapping[Hashable, Mapping[Key, Wanted]], now: float) -> None:
        """Probe these from now on, by group and key. A path that stays keeps what it knows."""
        keep = {key: path for paths in wanted.values() for key, path in paths.items()}
        self._mtus = None
        self._theirs = {group: mtu for group, mtu in self._theirs.items() if group in wanted}
        for key in [key for key, path in self._paths.items() if key not in keep or keep[key].size != path.own]:
            del self._paths[key]
            self._hurried.discard(key)
        for group, paths in wanted.items():
            for key, (size, let_in) in paths.items():
                if key not in self._paths:
                    self._paths[key] = Path(min(size, self._theirs.get(group, size)), now, own=size)
                self._paths[key].let_in = let_in
        old = self._groups
        self._groups = {group: deque(keys) for group, keys in wanted.items() if keys}
        for group, keys in self._groups.items():
            if group not in self._in_turn:
                self._in_turn.add(group)
                self._regulars.add(now, group)
            if group in old and set(old[group]) == set(keys):
                self._groups[group] = old[group]

    def interval(self) -> float:
        """Return the seconds between two regular probes of one peer."""
        return max(SHORTEST, len(self._groups) / self._rate)

    def _tick(self) -> float:
        return _TICK if self.interval() <= LONGEST_OF_FEW else _TICK_OF_MANY

    @property
    def hurried(self) -> bool:
        """Whether an answer decides something, and is to be taken in at once. Others may wait until `wake_at`."""
        return bool(self._hurried)

    def due(self, now: float) -> Iterator[Due[Key]]:
        """Yield the probes to send now; each counts as sent once it was yielded."""
        self._tokens = min(_BURST, self._tokens + max(0.0, now - self._filled) * self._rate)
        self._filled = now
        while (key := self._expiries.pop(now)) is not None:
            if key in self._paths:
                self._take(key, self._paths[key], lambda path: path.expire(now + _SLACK + _EPSILON))
        while self._tokens >= _ONE:
            found = self._next(now)
            if found is None:
                return
            key, path = found.key, self._paths[found.key]
            self._tokens -= 1.0
            self.sent += 1
            self._follow(key, path)
            tick = _QUICK_TICK if path.hurried else self._tick()
            self._expiries.add(math.ceil((path.expires_at(found.probe.sequence) - _SLACK) / tick) * tick, key)
            yield found

    def _next(self, now: float) -> Due[Key] | None:
        quick = self._quick(now) if not self._quick_last else None
        if quick is None:
            regular = self._regular(now)
            if regular is not None:
                self._quick_last = False
                return regular
            quick = self._quick(now)
        self._quick_last = quick is not None
        return quick

    def _quick(self, now: float) -> Due[Key] | None:
        while (key := self._quicks.pop(now)) is not None:
            self._queued.discard(key)
            path = self._paths.get(key)
            at = path.quick_at() if path else None
            if path is not None and at is not None:
                if at <= now:
                    return Due(key, path.quick(now))
                self._follow(key, path)
        return None

    def _regular(self, now: float) -> Due[Key] | None:
        while (group := self._regulars.pop(now)) is not None:
            keys = self._groups.get(group)
            if keys is None:
                self._in_turn.discard(group)
                continue
            # the other families of a new peer follow at once
            fresh = sum(not self._paths[key].sent for key in keys) > 1
            self._regulars.add(now if fresh else now + self.interval(), group)
            for _ in range(len(keys)):
                key = keys[0]
                keys.rotate(-1)
                probe = self._paths[key].regular(now)
                if probe is not None:
                    return Due(key, probe)
        return None

    def answered(self, key: Key, sequence: int, now: float) -> float | None:
        """Take in an answer, and return its round trip; None for a path or a probe that nobody waits for."""
        path = self._paths.get(key)
        return None if path is None else self._take(key, path, lambda path: path.answered(sequence, now))

    def left(self, key: Key, sequence: int, now: float) -> None:
        """Take in when a probe left, which `due` has just given out."""
        self._paths[key].left(sequence, now)

    def not_sent(self, key: Key, sequence: int, now: float) -> None:
        """Take in that a probe could not be sent."""
        if key in self._paths:
            self._take(key, self._paths[key], lambda path: path.not_sent(sequence, now))

    def heard(self, group: Hashable, passes_loops: bool, now: float) -> None:
        """Take in whether the filter of a peer treats loops as packets to its pods, as its agent's version says."""
        for key in self._groups.get(group, ()):
            if self._paths[key].passes_loops is not passes_loops:
                self._take(key, self._paths[key], lambda path: path.heard(passes_loops, now))

    def heard_mtu(self, group: Hashable, mtu: int, now: float) -> None:
        """Take in the MTU of a peer's pods in bytes. Where that changes a path's full size, it begins from nothing."""
        if group not in self._groups or self._theirs.get(group) == mtu:
            return
        self._theirs[group] = mtu
        for key in self._groups[group]:
            old = self._paths[key]
            if old.full != min(old.own, mtu):
                self._paths[key] = Path(min(old.own, mtu), now, old.let_in, old.own)
                self._paths[key].passes_loops = old.passes_loops
                self._hurried.discard(key)
                self.changed, self._mtus = True, None

    def _take(self, key: Key, path: Path, event: Callable[[Path], Result]) -> Result:
        state, lost, mtu = path.state, path.lost, path.path_mtu
        result = event(path)
        if path.state is not state or path.path_mtu != mtu:
            self.changed, self._mtus = True, None
        self.lost += path.lost - lost
        self._follow(key, path)
        return result

    def _follow(self, key: Key, path: Path) -> None:
        """Note what the path wants next."""
        (self._hurried.add if path.hurried else self._hurried.discard)(key)
        at = path.quick_at()
        if at is not None and key not in self._queued:
            self._queued.add(key)
            self._quicks.add(at, key)

    def wake_at(self, now: float) -> float:
        """Return when `due` has something to do next, if nothing is answered until then."""
        tick = self._tick()
        regular = math.ceil(self._regulars.next() / tick) * tick if self._groups else math.inf
        first = min(self._expiries.next(), self._quicks.next(), regular, now + LONGEST_OF_FEW)
        # without a token, wait for those of a whole tick
        token = now + max(0.0, max(1.0, tick * self._rate) - self._tokens) / self._rate
        return max(first, token if self._tokens < _ONE else now)

    def states(self) -> dict[Key, State]:
        """Return the state of each path: cheaper than `results`."""
        return {key: path.state for key, path in self._paths.items()}

    def path_mtus(self) -> dict[Key, int | None]:
        """Return what each path carries in bytes, where that is known: None for packets of full size."""
        if self._mtus is None:
            known = ((key, path.known_mtu, path.own) for key, path in self._paths.items())
            self._mtus = {key: mtu if mtu < own else None for key, mtu, own in known if mtu is not None}
        return self._mtus

    def results(self, chosen: Callable[[Key], bool] = lambda _: True) -> dict[Key, Reach]:
        """Return what is known of each path that is `chosen`."""
        return {key: path.reach() for key, path in self._paths.items() if chosen(key)}
