"""What the probes of one path tell: whether packets of full size come back, how fast, and how many are lost.

A path is one peer in one IP family. Times are seconds on a monotonic clock and come as arguments. The path says
which probe it wants next; it sends nothing itself (see scheduler and sender).

A regular probe is one echo request of full size, so one answer shows both that the peer is reachable and that
packets are not cut to small ones. Where it is lost, quick probes of both sizes follow within a second and decide.
Getting worse is believed at once after that; getting better takes a time without a loss, which doubles with each
relapse (as in BGP route flap damping, RFC 2439), so no pattern of losses makes a state flap.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from ovsmesh.dataplane.types import Reach, State

TIMEOUT = 1.0
"""Seconds after which an unanswered probe counts as lost."""
SMALL_SIZE = 68
"""Bytes of a small probe's IP packet: the smallest MTU that IPv4 allows (RFC 791)."""
WINDOW = 100
"""Outcomes and round trips that are kept: loss and p99 are of these."""
_QUICK_GAP = 0.15
"""Seconds between quick probes: three of each size go out within a second of the miss."""
_RECENT, _LOSSY = 20, 4
"""A path is lossy when at least 4 of its last 20 probes were lost."""
_CLEAN = 4
"""Answers in a row after which a path may be well again."""
_RELAPSE_MEMORY = 600.0
"""Seconds for which a relapse doubles the wait."""
_FIRST_HOLD, _LONGEST_HOLD = 1.0, 300.0
"""Seconds without a loss before a path is well again: the first time, and at most."""
_RECOVERY_GAP = 0.25
"""Seconds between the probes by which a path shows that it is well again."""
_SEARCH_TRIES = 3
"""Probes of one size in the search for the path MTU: all must be lost for the size to count as too large."""
_SEARCH_TIMEOUT = (0.3, 1.0)
"""Seconds to wait for those: eight round trips, within these limits."""
_RECHECK = 10.0
"""Seconds between probes of full size on a path that is known to carry only smaller ones."""


class Probe(NamedTuple):
    """An echo request to send: its sequence number, and the size of its IP packet in bytes."""

    sequence: int
    size: int


class _Round:
    """Probes that are judged together: sizes still to send, those under way, and what became of the others."""

    def __init__(self, kind: str, sizes: list[int]) -> None:
        self.kind = kind
        self.left = deque(sizes)
        self.answered: list[int] = []
        self.lost: list[int] = []

    def finished(self, under_way: int) -> bool:
        return not self.left and not under_way


class Path:
    """The state machine of one path. `full` is the size of a full packet in bytes: the pods' MTU."""

    def __init__(self, full: int, now: float) -> None:
        self.full = full
        self.state = State.UNPROBED
        self.since = now
        self.path_mtu: int | None = None
        self.sent = self.lost = 0
        self._sequence = 0
        self._under_way: dict[int, tuple[int, float, float]] = {}
        """Sequence → (size, sent at, counts as lost at)."""
        self._round = _Round("regular", [])
        self._next_quick = 0.0
        self._outcomes: deque[bool] = deque(maxlen=WINDOW)
        self._recent: deque[bool] = deque(maxlen=_RECENT)
        """The last outcomes; since the first answer where the path was unreachable."""
        self._trips: deque[float] = deque(maxlen=WINDOW)
        self._mean: float | None = None
        self._silent_since: float | None = None
        self._clean = 0
        self._clean_since = now
        self._relapses: deque[float] = deque(maxlen=16)
        self._range = (SMALL_SIZE, full)
        self._rechecked = now

    # What to send

    def regular(self, now: float) -> Probe | None:
        """Return the regular probe that is due; None while quick ones decide."""
        if self._round.left or self._under_way:
            return None
        size = self.usable
        if self.state is State.SMALL and now - self._rechecked >= _RECHECK:
            self._rechecked, size = now, self.full
        self._round = _Round("regular", [])
        return self._send(size, now)

    def quick_at(self) -> float | None:
        """Return when the next quick probe is due; None where none is wanted."""
        return self._next_quick if self._round.left else None

    def quick(self, now: float) -> Probe:
        """Return the next quick probe. Only to be called when `quick_at` names a time."""
        self._next_quick = now + (0.02 if self._round.kind in ("search", "verify") else _QUICK_GAP)
        return self._send(self._round.left.popleft(), now)

    @property
    def usable(self) -> int:
        """Bytes of the largest packet that is believed to pass."""
        return self.path_mtu or self.full

    def _send(self, size: int, now: float) -> Probe:
        self._sequence = (self._sequence + 1) & 0xFFFF
        limit = TIMEOUT
        if self._round.kind in ("search", "verify") and self._mean is not None:
            limit = min(max(8 * self._mean, _SEARCH_TIMEOUT[0]), _SEARCH_TIMEOUT[1])
        self._under_way[self._sequence] = (size, now, now + limit)
        self.sent += 1
        return Probe(self._sequence, size)

    # What came of it

    def answered(self, sequence: int, now: float) -> float | None:
        """Take in an answer, and return its round trip. One to an unknown or an expired probe changes nothing."""
        found = self._under_way.pop(sequence, None)
        if found is None:
            return None
        size, sent, _ = found
        trip = max(0.0, now - sent)
        self._trips.append(trip)
        self._silent_since = None
        self._mean = trip if self._mean is None else self._mean + (trip - self._mean) / 8
        self._round.answered.append(size)
        self._judge(now)
        return trip

    def not_sent(self, sequence: int, now: float) -> None:
        """Take in that a probe could not be sent, which is as good as lost."""
        found = self._under_way.get(sequence)
        if found is not None:
            self._under_way[sequence] = (found[0], found[1], now)
            self.expire(now)

    def expires_at(self) -> float | None:
        """Return when the next probe under way counts as lost; None where none is under way."""
        return min((end for _, _, end in self._under_way.values()), default=None)

    def expire(self, now: float) -> None:
        """Count the probes that are overdue as lost."""
        for sequence, (size, sent, end) in list(self._under_way.items()):
            if end <= now:
                del self._under_way[sequence]
                if self._silent_since is None:
                    self._silent_since = sent
                self._round.lost.append(size)
        self._judge(now)

    def _judge(self, now: float) -> None:
        """Draw what follows from the round once all of its probes are answered or lost."""
        done = self._round
        if not done.finished(len(self._under_way)) or not (done.answered or done.lost):
            return
        self._round = _Round("regular", [])
        if done.kind == "search":
            self._searched(done, now)
            return
        # what is larger than the path is known to carry says nothing about loss
        answered = sum(size <= self.usable for size in done.answered)
        lost = sum(size <= self.usable for size in done.lost)
        if answered and self.state is State.UNREACHABLE and not any(self._recent):
            self._recent.clear()
        for kept in (self._outcomes, self._recent):
            kept.extend([True] * answered + [False] * lost)
        self.lost += len(done.lost)
        if lost:
            self._clean = 0
        elif answered:
            if self._clean == 0:
                self._clean_since = now
            self._clean += answered
        if done.kind == "verify":
            self._verified(done, now)
        elif done.kind == "quick":
            self._after_quick(done, now)
        else:
            self._after_regular(done, now)

    def _after_regular(self, done: _Round, now: float) -> None:
        size = (done.answered + done.lost)[0]
        if size > self.usable:
            if done.answered:
                # full size passes again: three more must, before that is believed
                self._start("verify", [size] * 3, now)
        elif done.lost and self.state is not State.UNREACHABLE:
            self._start("quick", [SMALL_SIZE, self.usable] * 3, now)
        else:
            self._recover(now)

    def _after_quick(self, done: _Round, now: float) -> None:
        if not done.answered:
            self._become(State.UNREACHABLE, now)
        elif done.lost and min(done.lost) > max(done.answered):
            # every answer is to a smaller packet than every loss
            self._range = (max(done.answered), min(done.lost))
            self._search(now)
        elif done.lost and self._doubtful():
            self._start("quick", [self.usable] * 5, now)
        else:
            self._recover(now)

    def _recover(self, now: float) -> None:
        """Settle on a state, or ask for the answers that are still needed for that."""
        if self.state in (State.UNREACHABLE, State.LOSSY) and 0 < self._clean < self._needed():
            self._start("quick", [self.usable], now + _RECOVERY_GAP)
        else:
            self._settle(now)

    def _doubtful(self) -> bool:
        """Whether losses were seen and too few probes to tell a rate."""
        return len(self._recent) < _RECENT and self.state is not State.LOSSY

    def _needed(self) -> int:
        return _RECENT if self.state is State.LOSSY else _CLEAN

    def _settle(self, now: float) -> None:
        """Choose the state that the last outcomes show, where the path is reachable at all."""
        good = State.SMALL if self.path_mtu is not None else State.OK
        if self._recent.count(False) >= _LOSSY and any(self._recent):
            self._become(State.LOSSY, now)
        elif self._clean and (self.state is State.UNPROBED or self._clean >= self._needed()):
            self._become(good, now)

    def _hold(self, now: float) -> float:
        """Return for how many seconds a state must last before a better or another bad one is believed."""
        relapses = sum(now - at < _RELAPSE_MEMORY for at in self._relapses)
        return min(_FIRST_HOLD * 2.0 ** max(0, relapses - 1), _LONGEST_HOLD)

    def _become(self, state: State, now: float) -> bool:
        """Change to a state where that is to be believed; return whether it is the state now."""
        if state is self.state:
            return True
        if self.state is not State.UNPROBED:
            since = self._clean_since if state is State.OK else self.since
            if self.state is not State.OK and now - max(since, self.since) < self._hold(now):
                return False
            if state is not State.OK:
                self._relapses.append(now)
        self.state, self.since = state, now
        if state is State.UNREACHABLE:
            self.path_mtu = None
            self._recent.clear()
        return True

    # The search for the path MTU, by bisection

    def _start(self, kind: str, sizes: list[int], now: float) -> None:
        self._round = _Round(kind, sizes)
        self._next_quick = now

    def _search(self, now: float) -> None:
        low, high = self._range
        if high - low <= 1:
            self._start("verify", [low, high] * _CLEAN, now)
        else:
            self._start("search", [(low + high) // 2] * _SEARCH_TRIES, now)

    def _verified(self, done: _Round, now: float) -> None:
        """Believe a path MTU where nearly all packets of that size pass and none of the next; random losses do not."""
        low, high = self._range
        if self.path_mtu is not None and low not in done.answered + done.lost:
            if not done.lost:
                self.path_mtu = None
                self._become(State.OK, now)
        elif done.answered.count(low) >= _CLEAN - 1 and high not in done.answered:
            if self._become(State.SMALL, now):
                self.path_mtu, self._rechecked = low, now
        else:
            self._recover(now)

    def _searched(self, done: _Round, now: float) -> None:
        low, high = self._range
        size = (done.answered + done.lost)[0]
        self._range = (size, high) if done.answered else (low, size)
        self._search(now)

    # What is shown

    def reach(self) -> Reach:
        """Return what is known now."""
        trips = sorted(self._trips)
        p99 = trips[min(len(trips) - 1, int(len(trips) * 0.99))] if trips else None
        loss = self._outcomes.count(False) / len(self._outcomes) if self._outcomes else None
        return Reach(
            self.state, self.since, self._mean, p99, loss, self.path_mtu, self.sent, self.lost, self._silent_since
        )
