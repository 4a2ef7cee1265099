"""Send the probes and take in the answers, in a thread of its own: no reconcile waits for it, nor it for one.

Nothing of ovsmesh needs to run on a peer: its kernel forwards loops and answers echoes. Probes that the peers' own
agents send here are seen too: they tell that packets arrive from a peer whose answers do not. What is sent when, and
what follows from it, is decided in scheduler and path.
"""

from __future__ import annotations

import errno
import itertools
import select
import threading
import time
from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from ovsmesh.dataplane.types import Reach, State
from ovsmesh.mesh.types import IPAddress
from ovsmesh.metrics import Histogram
from ovsmesh.probe.packets import BATCH, MOST_PATHS, PodRoute, ProbeSockets, Received
from ovsmesh.probe.scheduler import RATE, Scheduler, Wanted
from ovsmesh.probe.targets import Target
from ovsmesh.wakeup import Wakeup

_REST = 0.01
"""Seconds of pause after a full batch, which bounds what a flood costs."""
_HEARD = 15.0
"""Seconds for which a packet from a peer counts as sign of life: three of its own intervals in a mesh of a hundred."""
_VERSION_HEARD = 60.0
"""Seconds for which a probe that shows a version counts more than one that does not: a command line may be older than
its host's agent."""
_NOTE = 1.0
"""Seconds between two words of changed states."""
_MARGIN = 0.2
"""Seconds: a probe of the peer may have been under way when the first of ours was lost."""
_NEVER = float("-inf")

_Key = tuple[str, IPAddress]
_WORST = (State.UNREACHABLE, State.NOT_FORWARDED, State.SMALL, State.LOSSY, State.UNPROBED, State.OK)
_TRIPS = Histogram((0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0))


class Totals(NamedTuple):
    """Probes to all peers since the start, those to peers that left too. Round trips are in seconds."""

    sent: int = 0
    lost: int = 0
    round_trips: Histogram = _TRIPS


class Prober:
    """Probes the peers that `update` names until `close`. All methods may be called from any thread."""

    def __init__(self, astray: PodRoute, rate: float = RATE) -> None:
        """Open the sockets and start, with a budget of `rate` probes a second.

        `astray` is called in the thread that sends. Raises OSError without the right to use raw sockets.
        """
        self._lock = threading.Lock()
        self._sockets = ProbeSockets(astray)
        self._scheduler: Scheduler[_Key] = Scheduler(time.monotonic(), rate)
        self._targets: dict[_Key, Target] = {}
        self._numbers: dict[_Key, int] = {}
        self._keys: dict[int, _Key] = {}
        """What `_numbers` says, the other way round."""
        self._counted = itertools.count(1)
        self._names: dict[bytes, str] = {}
        """Gateway → peer."""
        self._trips, self._trips_sum = [0] * (len(_TRIPS.bounds) + 1), 0.0
        """Round trips in each bucket of the histogram, and the sum of all."""
        self._heard: dict[str, float] = {}
        self._version_heard: dict[str, float] = {}
        self._mtus: tuple[object, dict[str, int | None]] = (None, {})
        """What `path_mtus` was made of last, and what it returned."""
        self._errors: dict[tuple[_Key, bool], str] = {}
        """Why probes to a path can't be sent: loops, or echo requests (True)."""
        self._wakeup, self._changes = Wakeup(), Wakeup()
        self.fd = self._changes.fd
        """Readable after the state of a peer has changed, until `drain`."""
        self._noted = _NEVER
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)
        self._thread.start()

    def update(self, peers: Mapping[str, Iterable[Target]]) -> None:
        """Probe these peers from now on; what is known of paths that stay is kept."""
        wanted = {(name, target.destination): target for name, targets in peers.items() for target in targets}
        if wanted == self._targets:
            return
        with self._lock:
            groups: dict[object, dict[_Key, Wanted]] = {}
            for key, target in wanted.items():
                if target.destination.version in self._sockets.versions:
                    groups.setdefault(key[0], {})[key] = Wanted(target.size, target.let_in)
            self._targets = wanted
            self._numbers = {key: number for key, number in self._numbers.items() if key in wanted}
            taken = set(self._numbers.values())
            for key in wanted.keys() - self._numbers.keys():
                # counted on, so that a late answer to a path that left is taken for no other's
                while (number := next(self._counted) % MOST_PATHS) in taken and len(taken) < MOST_PATHS:
                    pass
                taken.add(number)
                self._numbers[key] = number
            self._keys = {number: key for key, number in self._numbers.items()}
            self._names = {key[1].packed: key[0] for key in wanted}
            for held in (self._heard, self._version_heard):
                for name in held.keys() - peers.keys():
                    del held[name]
            self._errors = {of: text for of, text in self._errors.items() if of[0] in wanted}
            self._scheduler.update(groups, time.monotonic())
        self._wakeup.wake()

    def drain(self) -> bool:
        """Return whether a state has changed since the last call."""
        return self._changes.clear()

    def states(self) -> dict[str, State]:
        """Return the state of each peer, its worst path's."""
        with self._lock:
            states = self._scheduler.states()
        found: dict[str, State] = {}
        for (name, _), state in states.items():
            found[name] = min(state, found.get(name, state), key=_WORST.index)
        return found

    def path_mtus(self) -> dict[str, int | None]:
        """Return what the way to each peer carries in bytes, where that is known: None for packets of full size."""
        with self._lock:
            mtus = self._scheduler.path_mtus()
        if mtus is self._mtus[0]:
            return self._mtus[1]
        found: dict[str, int | None] = {}
        for (name, _), mtu in mtus.items():
            other = found.get(name)
            found[name] = mtu if other is None or (mtu is not None and mtu < other) else other
        self._mtus = mtus, found
        return found

    def results(self, peers: Container[str] | None = None) -> dict[str, Reach]:
        """Return what is known now of these peers, or of all."""
        with self._lock:
            reaches = self._scheduler.results(lambda key: peers is None or key[0] in peers)
            heard, errors = dict(self._heard), dict(self._errors)
        now, epoch = time.monotonic(), time.time()
        found: dict[str, Reach] = {}
        for key, reach in reaches.items():
            name = key[0]
            one = replace(
                reach,
                since=reach.since + epoch - now,
                silent_since=None if reach.silent_since is None else reach.silent_since + epoch - now,
                # what came before the first loss came before the fault
                heard=heard.get(name, _NEVER) > max(now - _HEARD, (reach.silent_since or _NEVER) + _MARGIN),
                error=errors.get((key, False), errors.get((key, True), "")),
                destination=str(key[1]),
            )
            old = found.get(name)
            if old is None or _WORST.index(one.state) < _WORST.index(old.state):
                found[name] = one
        return found

    def totals(self) -> Totals:
        """Return how many probes were sent and lost since the start, and how long the answers took."""
        with self._lock:
            trips = _TRIPS._replace(counts=tuple(self._trips), sum=self._trips_sum)
            return Totals(self._scheduler.sent, self._scheduler.lost, trips)

    def close(self) -> None:
        """Stop probing; takes a second at most."""
        self._stopping = True
        self._wakeup.wake()
        self._thread.join(1.0)
        self._sockets.close()
        self._wakeup.close()
        self._changes.close()

    # The thread

    def _run(self) -> None:
        # a wake-up costs more than a probe: an answer that decides nothing waits for the next one
        seldom, often = select.poll(), select.poll()
        for fd in (self._wakeup.fd, *self._sockets.fds()):
            often.register(fd, select.POLLIN)
        seldom.register(self._wakeup.fd, select.POLLIN)
        while not self._stopping:
            with self._lock:
                now = time.monotonic()
                self._sockets.follow_bridge()
                self._send_due(now)
                self._note_changes(now)
                wake = self._scheduler.wake_at(now)
                if self._scheduler.changed:
                    wake = min(wake, self._noted + _NOTE)
                poll = often if self._scheduler.hurried else seldom
                pause = max(0.0, wake - time.monotonic())
            if any(fd == self._wakeup.fd for fd, _ in poll.poll(min(pause, 5.0) * 1000 + 1)):
                self._wakeup.clear()
            taken = 0
            with self._lock:
                for got in self._sockets.receive():
                    self._take(got)
                    taken += 1
            if taken >= BATCH:
                time.sleep(_REST)

    def _send_due(self, now: float) -> None:
        for key, probe in self._scheduler.due(now):
            send = self._sockets.send_echo if probe.echo else self._sockets.send_loop
            left = time.monotonic()
            try:
                send(self._targets[key], self._numbers[key], probe.sequence, probe.size)
                self._errors.pop((key, probe.echo), None)
                self._scheduler.left(key, probe.sequence, left)
            except OSError as error:
                what = "a filter of this host drops it" if error.errno == errno.EPERM else error.strerror or str(error)
                self._errors[key, probe.echo] = what
                self._scheduler.not_sent(key, probe.sequence, now)

    def _take(self, got: Received) -> None:
        if got.own:
            key = self._keys.get(got.number)
            if got.too_big and (key is None or self._names.get(got.source) != key[0]):
                return
            trip = None if key is None else self._scheduler.answered(key, got.sequence, got.at)
            if trip is not None:
                self._trips[bisect_left(_TRIPS.bounds, trip)] += 1
                self._trips_sum += trip
        elif (name := self._names.get(got.source)) is not None:
            self._heard[name] = got.at
            if got.mtu:
                self._scheduler.heard_mtu(name, got.mtu, got.at)
            if got.shows_version:
                self._version_heard[name] = got.at
            if got.shows_version or got.at - self._version_heard.get(name, _NEVER) > _VERSION_HEARD:
                self._scheduler.heard(name, got.shows_version, got.at)

    def _note_changes(self, now: float) -> None:
        """Wake the readers of changes, once in _NOTE seconds: a thousand new peers change one after the other."""
        if self._scheduler.changed and now - self._noted >= _NOTE:
            self._scheduler.changed, self._noted = False, now
            self._changes.wake()
