"""Which path is probed when: every peer in turn, within a fixed budget of packets.

Up to a hundred peers are probed at least every five seconds each; above that the budget is shared, so each waits
longer. Quick probes go first, and regular ones keep half of the budget while both wait: nobody is starved.
Times are seconds on a monotonic clock and come as arguments; nothing is sent here.
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
SHORTEST, LONGEST_OF_FEW = 1.0, 5.0
"""Seconds between two regular probes of a peer: with few peers, and with a hundred."""
_BURST = 20.0
_TICK = 0.25
"""Seconds between wake-ups for regular probes."""
_ONE = 1.0 - 1e-6
"""A whole token, as far as floating point tells."""

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class Due(NamedTuple, Generic[Key]):
    """A probe to send now, and the path that it is for."""

    key: Key
    probe: Probe


class Scheduler(Generic[Key]):
    """All paths of a node. Keys are the caller's; `groups` of keys (a peer's families) share one turn."""

    def __init__(self, now: float, rate: float = RATE) -> None:
        """Make an empty one. `rate` is the budget in probes a second."""
        self._rate = rate
        self._paths: dict[Key, Path] = {}
        self._groups: dict[Hashable, deque[Key]] = {}
        self._heap: list[tuple[float, int, Hashable]] = []
        self._count = 0
        self._tokens, self._filled = _BURST, now
        self._quick_last = False
        self.sent = self.lost = 0
        """Probes of all paths since the start, those of peers that left too."""
        self.changed = False
        """Whether a path has changed its state; the caller sets it back."""
        self._busy: set[Key] = set()
        """Paths with probes under way, or with quick ones to send: few, whatever the size of the mesh."""

    def update(self, wanted: Mapping[Hashable, Mapping[Key, int]], now: float) -> None:
        """Probe these from now on: group → key → bytes of a full packet. A path that stays keeps what it knows."""
        keep = {key: size for sizes in wanted.values() for key, size in sizes.items()}
        for key in [key for key, path in self._paths.items() if keep.get(key) != path.full]:
            del self._paths[key]
        for key, size in keep.items():
            if key not in self._paths:
                self._paths[key] = Path(size, now)
        old = self._groups
        self._groups = {group: deque(sizes) for group, sizes in wanted.items() if sizes}
        for group, keys in self._groups.items():
            if group not in old:
                self._push(now, group)
            elif set(old[group]) == set(keys):
                self._groups[group] = old[group]

    def interval(self) -> float:
        """Return the seconds between two regular probes of one peer."""
        return max(SHORTEST, len(self._groups) / self._rate)

    def due(self, now: float) -> Iterator[Due[Key]]:
        """Yield the probes to send now; each counts as sent once it was yielded."""
        self._tokens = min(_BURST, self._tokens + max(0.0, now - self._filled) * self._rate)
        self._filled = now
        for key in list(self._busy):
            path = self._paths.get(key)
            if path is not None and (end := path.expires_at()) is not None and end <= now:
                self._take(path, lambda path: path.expire(now))
            if path is None or (path.expires_at() is None and path.quick_at() is None):
                self._busy.discard(key)
        while self._tokens >= _ONE:
            found = self._next(now)
            if found is None:
                return
            self._tokens -= 1.0
            self._busy.add(found.key)
            self.sent += 1
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
        first: tuple[float, Key] | None = None
        for key in self._busy:
            at = self._paths[key].quick_at() if key in self._paths else None
            if at is not None and at <= now and (first is None or at < first[0]):
                first = at, key
        return Due(first[1], self._paths[first[1]].quick(now)) if first else None

    def _regular(self, now: float) -> Due[Key] | None:
        while self._heap and self._heap[0][0] <= now:
            _, _, group = heapq.heappop(self._heap)
            keys = self._groups.get(group)
            if keys is None:
                continue
            # the other families of a new peer follow at once
            fresh = sum(not self._paths[key].sent for key in keys) > 1
            self._push(now if fresh else now + self.interval(), group)
            for _ in range(len(keys)):
                key = keys[0]
                keys.rotate(-1)
                probe = self._paths[key].regular(now)
                if probe is not None:
                    return Due(key, probe)
        return None

    def _push(self, at: float, group: Hashable) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, group))

    def answered(self, key: Key, sequence: int, now: float) -> float | None:
        """Take in an answer, and return its round trip; None for a path or a probe that nobody waits for."""
        path = self._paths.get(key)
        return None if path is None else self._take(path, lambda path: path.answered(sequence, now))

    def not_sent(self, key: Key, sequence: int, now: float) -> None:
        """Take in that a probe could not be sent."""
        if key in self._paths:
            self._take(self._paths[key], lambda path: path.not_sent(sequence, now))

    def _take(self, path: Path, event: Callable[[Path], Result]) -> Result:
        state, lost = path.state, path.lost
        result = event(path)
        self.changed |= path.state is not state
        self.lost += path.lost - lost
        return result

    def wake_at(self, now: float) -> float:
        """Return when `due` has something to do next, if nothing is answered until then."""
        busy = [self._paths[key] for key in self._busy if key in self._paths]
        times = [at for path in busy for at in (path.quick_at(), path.expires_at()) if at is not None]
        if self._heap:
            # regular probes go out a few at a time: a wake-up costs more than a probe
            times.append(math.ceil(self._heap[0][0] / _TICK) * _TICK)
        # without a token, wait for those of a whole tick
        token = now + max(0.0, max(1.0, _TICK * self._rate) - self._tokens) / self._rate
        return max(min(times, default=now + LONGEST_OF_FEW), token if self._tokens < _ONE else now)

    def states(self) -> dict[Key, State]:
        """Return the state of each path: cheaper than `results`."""
        return {key: path.state for key, path in self._paths.items()}

    def results(self, chosen: Callable[[Key], bool] = lambda _: True) -> dict[Key, Reach]:
        """Return what is known of each path that is `chosen`."""
        return {key: path.reach() for key, path in self._paths.items() if chosen(key)}
