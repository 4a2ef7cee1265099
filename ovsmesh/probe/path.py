"""What the probes of one path tell: whether packets of full size come back, how fast, and how many are lost.

A path is one peer in one IP family. Times are seconds on a monotonic clock and come as arguments. The path says
which probe it wants next; it sends nothing itself (see scheduler and sender).

There are two kinds of probe. A loop is addressed to the node that sends it: the peer forwards it back, as it forwards
packets of pods. An echo request is answered by the peer itself. Loops are the rule; where they are lost, echoes tell
a peer that does not forward from one that nothing reaches. Echoes take the place of loops where those can't come
back: this node's switch does not let them in yet, or the peer's agent is of a version whose filter drops them.

A regular probe is of full size, so one that comes back shows both that the peer is reachable and that packets are not
cut to small ones. Where it is lost, quick probes of both sizes follow within a second and decide. Getting worse is
believed at once after that; getting better takes a time without a loss, which doubles with each relapse (as in BGP
route flap damping, RFC 2439), so no pattern of losses makes a state flap.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from ovsmesh.dataplane.types import Reach, State

TIMEOUT = 1.0
"""Seconds after which an unanswered probe counts as lost."""
SMALL_SIZE = 68
"""Bytes of a small probe's IP packet: the smallest MTU that IPv4 allows (RFC 791)."""
WINDOW = 100
"""Outcomes and round trips that are kept: loss and p99 are of these."""
_GAP, _GAPS = 0.1, {"more": 0.05, "search": 0.02, "verify": 0.02}
"""Seconds between the probes of a round, and of some kinds: all quick ones go out within a second of the miss."""
_RECENT, _LOSSY = 20, 4
"""A path is lossy when at least 4 of its last 20 probes were lost."""
_MORE = 12
"""Probes that follow where a loss leaves open whether the path is lossy."""
_CLEAN = 4
"""Answers in a row after which a path may be well again."""
_RELAPSE_MEMORY, _RELAPSES = 600.0, 16
"""Seconds for which a relapse doubles the wait, and how many are remembered."""
_FIRST_HOLD, _LONGEST_HOLD = 1.0, 300.0
"""Seconds without a loss before a path is well again: the first time, and at most."""
_RECOVERY_GAP = 0.25
"""Seconds between the probes by which a path shows that it is well again."""
_SOON = 5.0
"""Seconds: a path that may be believed to be well again sooner than that does not wait for its regular probe."""
_SEARCH_TRIES = 3
"""Probes of one size in the search for the path MTU: all must be lost for the size to count as too large."""
_SEARCH_TIMEOUT = (0.3, 1.0)
"""Seconds to wait for those: eight round trips, within these limits."""
_FAR = 2.0
"""Two round trips in a row that differ from the mean by this factor make a mean of their own."""
_GRACE = 6.0
"""Seconds that a peer has to show its agent's version, before loops that never came back are held against it: its
agent's interval in a mesh of a hundred, and one."""
_DEAD = frozenset({State.UNREACHABLE, State.NOT_FORWARDED})
"""States of a path on which nothing comes back as it should."""


class Probe(NamedTuple):
    """A probe to send: its sequence number, the size of its IP packet in bytes, and whether it is an echo request."""

    sequence: int
    size: int
    echo: bool


class _Shot(NamedTuple):
    """A probe as it is judged."""

    size: int
    echo: bool


class _Round:
    """Probes that are judged together: those still to send, and what became of the others."""

    __slots__ = ("answered", "kind", "left", "lost")

    def __init__(self, kind: str, shots: list[_Shot]) -> None:
        self.kind = kind
        self.left = shots
        self.answered: list[_Shot] = []
        self.lost: list[_Shot] = []


class _Outcomes:
    """Whether each of the last `limit` probes was lost, as the bits of a number under a leading 1."""

    __slots__ = ("_bits", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bits = 1

    def add(self, answered: int, lost: int) -> None:
        bits = ((self._bits << answered) << lost) | ((1 << lost) - 1)
        over = bits.bit_length() - 1 - self._limit
        self._bits = bits if over <= 0 else bits & ((1 << self._limit) - 1) | 1 << self._limit

    def clear(self) -> None:
        self._bits = 1

    @property
    def total(self) -> int:
        return self._bits.bit_length() - 1

    @property
    def lost(self) -> int:
        return self._bits.bit_count() - 1


class Path:
    """The state machine of one path. `full` is the size of a full packet in bytes: the smaller MTU of the two ends."""

    __slots__ = (
        "_answered_since",
        "_clean",
        "_clean_since",
        "_far",
        "_mean",
        "_next_quick",
        "_outcomes",
        "_range",
        "_recent",
        "_relapses",
        "_round",
        "_sequence",
        "_silent_since",
        "_trips",
        "_trips_at",
        "_turn",
        "_under_way",
        "full",
        "let_in",
        "lost",
        "own",
        "passes_loops",
        "path_mtu",
        "sent",
        "since",
        "state",
    )

    def __init__(self, full: int, now: float, let_in: bool = True, own: int = 0) -> None:
        self.full = full
        self.own = own or full
        """Bytes of a full packet of this node's own pods."""
        self.let_in = let_in
        """Whether this node's switch lets loops in."""
        self.passes_loops: bool | None = None
        """Whether the peer's filter is known to treat loops as packets to its pods."""
        self.state = State.UNPROBED
        self.since = now
        self.path_mtu: int | None = None
        self.sent = self.lost = 0
        self._sequence = self._turn = 0
        self._under_way: dict[int, tuple[_Shot, float, float]] = {}
        """Sequence → (what was sent, when, when it counts as lost)."""
        self._round: _Round | None = None
        self._next_quick = 0.0
        self._outcomes = _Outcomes(WINDOW)
        self._recent = _Outcomes(_RECENT)
        """The last outcomes; since the first answer where the path was dead."""
        self._trips = array("f")
        self._trips_at = 0
        self._mean: float | None = None
        self._silent_since: float | None = None
        self._answered_since: float | None = None
        """When the first answer came of any kind since the path was unreachable."""
        self._clean = 0
        self._clean_since = now
        self._relapses: tuple[float, ...] = ()
        self._range = (SMALL_SIZE, full)
        self._far = 0
        """Whether the last round trip was far above the mean (1), or below (-1)."""

    @property
    def echoes(self) -> bool:
        """Whether echoes take the place of loops."""
        return not self.let_in or self.passes_loops is False

    # What to send

    def regular(self, now: float) -> Probe | None:
        """Return the regular probe that is due; None while quick ones decide."""
        if self._round is not None:
            return None
        self._turn += 1
        if self.usable < self.full:
            # each turn asks too whether full size passes again, and some, whether a little more does
            more = [self.usable + 1] if self._turn % 2 and self.usable + 1 < self.full else []
            self._start("recheck", [self.usable, *more], now)
            return self._send(_Shot(self.full, self.echoes), now)
        size, echo = self.usable, self.echoes
        if self.state in _DEAD and self._turn % (2 if self.state is State.UNREACHABLE else 4) == 0:
            echo = True
        elif self.state in _DEAD and self._turn % 4 == 1:
            # it may come back on a path that carries less
            size = SMALL_SIZE
        self._round = _Round("regular", [])
        return self._send(_Shot(size, echo), now)

    @property
    def hurried(self) -> bool:
        """Whether answers are waited for that decide something: more than a regular probe is under way."""
        return self._round is not None and self._round.kind != "regular"

    def quick_at(self) -> float | None:
        """Return when the next quick probe is due; None where none is wanted."""
        return self._next_quick if self._round is not None and self._round.left else None

    def quick(self, now: float) -> Probe:
        """Return the next quick probe. Only to be called when `quick_at` names a time."""
        assert self._round is not None
        self._next_quick = now + _GAPS.get(self._round.kind, _GAP)
        return self._send(self._round.left.pop(0), now)

    @property
    def usable(self) -> int:
        """Bytes of the largest packet that is believed to pass."""
        return self.path_mtu or self.full

    def _send(self, shot: _Shot, now: float) -> Probe:
        self._sequence = (self._sequence + 1) & 0xFFFF
        limit = TIMEOUT
        if self._round is not None and self._round.kind in ("search", "verify") and self._mean is not None:
            limit = min(max(8 * self._mean, _SEARCH_TIMEOUT[0]), _SEARCH_TIMEOUT[1])
        self._under_way[self._sequence] = (shot, now, now + limit)
        self.sent += 1
        return Probe(self._sequence, shot.size, shot.echo)

    # What came of it

    def answered(self, sequence: int, now: float) -> float | None:
        """Take in an answer, and return its round trip. One to an unknown or an expired probe changes nothing."""
        found = self._under_way.pop(sequence, None)
        if found is None or self._round is None:
            return None
        shot, sent, _ = found
        trip = max(0.0, now - sent)
        if len(self._trips) < WINDOW:
            self._trips.append(trip)
        else:
            self._trips[self._trips_at] = trip
            self._trips_at = (self._trips_at + 1) % WINDOW
        self._silent_since = None
        if self._answered_since is None:
            self._answered_since = now
        self._average(trip)
        self._round.answered.append(shot)
        self._judge(now)
        return trip

    def _average(self, trip: float) -> None:
        """Take a round trip into the mean, exponentially weighted by 1/8, as TCP's in RFC 6298."""
        mean = trip if self._mean is None else self._mean
        far = 1 if trip > mean * _FAR else -1 if trip < mean / _FAR else 0
        # a path that got longer or shorter is to show at once
        self._mean = trip if far and far == self._far else mean + (trip - mean) / 8
        self._far = far

    def left(self, sequence: int, now: float) -> None:
        """Take in when a probe left: later than it was asked for, on a busy host. It expires when it would have."""
        shot, _, end = self._under_way[sequence]
        self._under_way[sequence] = (shot, now, end)

    def not_sent(self, sequence: int, now: float) -> None:
        """Take in that a probe could not be sent, which is as good as lost."""
        found = self._under_way.get(sequence)
        if found is not None:
            self._under_way[sequence] = (found[0], found[1], now)
            self.expire(now)

    def expires_at(self, sequence: int) -> float:
        """Return when a probe under way counts as lost."""
        return self._under_way[sequence][2]

    def expire(self, now: float) -> None:
        """Count the probes that are overdue as lost."""
        for sequence, (shot, sent, end) in list(self._under_way.items()):
            if end <= now and self._round is not None:
                del self._under_way[sequence]
                if self._silent_since is None:
                    self._silent_since = sent
                self._round.lost.append(shot)
        self._judge(now)

    def heard(self, passes_loops: bool, now: float) -> None:
        """Take in what the version of the peer's agent says: whether its filter treats loops as packets to its pods."""
        if self.passes_loops is not passes_loops:
            self.passes_loops = passes_loops
            if not passes_loops and self.state is State.NOT_FORWARDED and self._round is None:
                self._decide_by_echoes(now)

    def _judge(self, now: float) -> None:
        """Draw what follows from the round once all of its probes are answered or lost."""
        done = self._round
        if done is None or done.left or self._under_way or not (done.answered or done.lost):
            return
        self._round = None
        if done.kind == "search":
            self._searched(done, now)
            return
        # an echo beside loops only tells the cause; what is larger than the path carries says nothing about loss
        answered = sum(shot.size <= self.usable and self._counts(shot) for shot in done.answered)
        lost = sum(shot.size <= self.usable and self._counts(shot) for shot in done.lost)
        if answered and self.state in _DEAD and self._recent.lost == self._recent.total:
            self._recent.clear()
        if answered and self.state is State.UNPROBED:
            # what went out before the peer was there is no loss of the path
            self._outcomes.clear()
        for kept in (self._outcomes, self._recent):
            kept.add(answered, lost)
        self.lost += len(done.lost)
        if lost:
            self._clean = 0
        elif answered:
            if self._clean == 0:
                self._clean_since = now
            self._clean += answered
        if done.kind == "recheck":
            self._rechecked(done, now)
        elif done.kind == "verify":
            self._verified(done, now)
        elif done.kind == "quick":
            self._after_quick(done, now)
        elif done.kind == "more":
            self._after_more(done, now)
        else:
            self._after_regular(done, now)

    def _counts(self, shot: _Shot) -> bool:
        return shot.echo == self.echoes

    def _after_regular(self, done: _Round, now: float) -> None:
        shot = (done.answered + done.lost)[0]
        if not self._counts(shot):
            if bool(done.answered) == (self.state is State.UNREACHABLE):
                # an echo that shows something else than the state
                self._decide(now)
        elif done.answered if shot.size < self.usable else done.lost and self.state not in _DEAD:
            self._decide(now)
        else:
            self._recover(now)

    def _rechecked(self, done: _Round, now: float) -> None:
        largest = max((shot.size for shot in done.answered), default=0)
        if largest == self.full:
            # three more must pass before that is believed
            self._start("verify", [self.full] * 3, now)
        elif largest > self.usable:
            self._range = (largest, self.full)
            self._search(now)
        elif any(shot.size <= self.usable for shot in done.lost):
            self._decide(now)
        else:
            self._settle(now)

    def _decide(self, now: float) -> None:
        """Send three quick probes of both sizes, and of echoes."""
        if self.echoes:
            self._decide_by_echoes(now)
            return
        self._start("quick", [], now)
        assert self._round is not None
        self._round.left = [_Shot(SMALL_SIZE, False), _Shot(self.usable, False), _Shot(SMALL_SIZE, True)] * 3

    def _decide_by_echoes(self, now: float) -> None:
        self._recent.clear()
        self._start("quick", [SMALL_SIZE, self.usable] * 3, now)

    def _after_quick(self, done: _Round, now: float) -> None:
        answered = [shot.size for shot in done.answered if self._counts(shot)]
        lost = [shot.size for shot in done.lost if self._counts(shot)]
        if not answered and any(map(self._counts, done.lost)):
            if done.answered:
                self._not_looped(now)
            else:
                self._become(State.UNREACHABLE, now)
        elif lost and answered and min(lost) > max(answered):
            # every answer is to a smaller packet than every loss
            self._range = (max(answered), min(lost))
            self._search(now)
        elif (lost or self._recent.lost > 1) and self._doubtful():
            # one loss may be chance; a second among the last ones is looked into
            self._start("more", [self.usable] * _MORE, now)
        else:
            self._recover(now)

    def _after_more(self, done: _Round, now: float) -> None:
        if len(done.lost) > 1 and not done.answered and self.state not in _DEAD:
            self._decide(now)
        elif done.lost and self._doubtful():
            self._start("more", [self.usable] * _MORE, now)
        else:
            self._recover(now)

    def _not_looped(self, now: float) -> None:
        """Judge a peer that answers echoes, and from which no loop comes back."""
        waited = now - (now if self._answered_since is None else self._answered_since)
        if self.passes_loops or waited >= _GRACE:
            self._become(State.NOT_FORWARDED, now)

    def _recover(self, now: float) -> None:
        """Settle on a state, or ask for the answers that are still needed for that."""
        bad = self.state in _DEAD or self.state is State.LOSSY
        if bad and 0 < self._clean < self._needed():
            self._start("more", [self.usable], now + _RECOVERY_GAP)
            return
        self._settle(now)
        if bad and self._clean and (wait := max(self._clean_since, self.since) + self._hold(now) - now) < _SOON:
            self._start("more", [self.usable], now + max(wait, _RECOVERY_GAP))

    def _doubtful(self) -> bool:
        """Whether a loss leaves open whether the path is lossy. Not for long: the losses of all rounds add up."""
        known = self.state is State.LOSSY or self.state in _DEAD
        return not known and (self._recent.total < _RECENT or self._recent.lost < _LOSSY)

    def _needed(self) -> int:
        return _RECENT if self.state is State.LOSSY else _CLEAN

    def _settle(self, now: float) -> None:
        """Choose the state that the last outcomes show, where the path is reachable at all."""
        good = State.SMALL if self.path_mtu is not None else State.OK
        if self._recent.lost >= _LOSSY and self._recent.lost < self._recent.total:
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
                self._relapses = (*self._relapses[1 - _RELAPSES :], now)
        self.state, self.since = state, now
        if state in _DEAD:
            self.path_mtu = None
            self._recent.clear()
        if state is State.UNREACHABLE:
            self._answered_since = None
        return True

    # The search for the path MTU, by bisection

    def _start(self, kind: str, sizes: list[int], now: float) -> None:
        self._round = _Round(kind, [_Shot(size, self.echoes) for size in sizes])
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
        answered = [shot.size for shot in done.answered]
        if self.path_mtu is not None and low not in answered + [shot.size for shot in done.lost]:
            if not done.lost and self._become(State.OK, now):
                self.path_mtu = None
        elif answered.count(low) >= _CLEAN - 1 and high not in answered:
            if self._become(State.SMALL, now):
                self.path_mtu = low
                # the losses were those of larger packets
                self._recent.clear()
        else:
            self._recover(now)

    def _searched(self, done: _Round, now: float) -> None:
        low, high = self._range
        size = (done.answered + done.lost)[0].size
        self._range = (size, high) if done.answered else (low, size)
        self._search(now)

    # What is shown

    @property
    def known_mtu(self) -> int | None:
        """Bytes of the largest packet that passes, `full` where all do; None where that is not known now."""
        return self.full if self.state is State.OK else self.path_mtu

    def reach(self) -> Reach:
        """Return what is known now."""
        trips = sorted(self._trips)
        p99 = trips[min(len(trips) - 1, int(len(trips) * 0.99))] if trips else None
        loss = self._outcomes.lost / self._outcomes.total if self._outcomes.total else None
        mtu = self.full if self.state is State.OK and self.full < self.own else self.path_mtu
        return Reach(self.state, self.since, self._mean, p99, loss, mtu, self.sent, self.lost, self._silent_since)
