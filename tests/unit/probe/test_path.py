"""What is concluded from answers and losses, on simulated links: detection, recovery, path MTU, and no flapping."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovsmesh.dataplane.types import State
from ovsmesh.probe.path import Probe
from ovsmesh.probe.scheduler import RATE, Scheduler, Wanted

FULL = 1462
Link = Callable[[float, Probe], bool]
"""(time, what was sent) → whether it comes back."""


class Network:
    """Peers behind simulated links, probed by a scheduler on a simulated clock."""

    def __init__(self, links: dict[str, Link], trip: float = 0.001, let_in: bool = True) -> None:
        self.links, self.trip = links, trip
        self.now = 1000.0
        self.scheduler: Scheduler[str] = Scheduler(self.now)
        self.scheduler.update({name: {name: Wanted(FULL, let_in)} for name in links}, self.now)
        self.sent: list[tuple[float, str]] = []
        self.changes: dict[str, list[tuple[float, State]]] = {name: [] for name in links}
        self._answers: list[tuple[float, str, int]] = []
        self._shown: dict[str, State] = {}
        self._watch(links)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            touched = set(self.scheduler._paths)
            for due in self.scheduler.due(self.now):
                self.sent.append((self.now, due.key))
                touched.add(due.key)
                if self.links[due.key](self.now, due.probe):
                    heapq.heappush(self._answers, (self.now + self.trip, due.key, due.probe.sequence))
            wake = self.scheduler.wake_at(self.now)
            if self._answers and self._answers[0][0] <= wake:
                self.now, key, sequence = heapq.heappop(self._answers)
                self.scheduler.answered(key, sequence, self.now)
                touched.add(key)
            else:
                assert wake > self.now, "a wake-up in the past would spin"
                self.now = wake
            self._watch(touched)
        self.now = max(self.now, end)

    def _watch(self, keys: Iterable[str]) -> None:
        for key in keys:
            state = self.state(key)
            if self._shown.get(key) is not state:
                self._shown[key] = state
                self.changes[key].append((self.now, state))

    def state(self, name: str) -> State:
        return self.scheduler._paths[name].state

    def until(self, name: str, state: State, limit: float) -> float:
        """Run until a path is in a state; return after how many seconds."""
        start = self.now
        while self.state(name) is not state:
            assert self.now - start < limit, f"{self.state(name)} after {limit} s, wanted {state}"
            self.run(0.05)
        return self.now - start


class Faulty:
    """A link whose behaviour a test changes."""

    def __init__(self) -> None:
        self.up, self.mtu, self.loss, self.forwards = True, FULL, 0.0, True
        self._random = random.Random(7)

    def __call__(self, now: float, probe: Probe) -> bool:
        passes = self.up and probe.size <= self.mtu and self._random.random() >= self.loss
        return passes and (self.forwards or probe.echo)


def one(peers: int = 1, let_in: bool = True) -> tuple[Network, Faulty]:
    link = Faulty()
    links: dict[str, Link] = {"web1": link}
    links |= {f"other{n}": lambda now, probe: True for n in range(peers - 1)}
    return Network(links, let_in=let_in), link


def test_a_peer_is_not_well_before_it_has_answered() -> None:
    network, link = one()
    link.up = False
    assert network.state("web1") is State.UNPROBED
    assert network.until("web1", State.UNREACHABLE, 5) > 0
    assert [state for _, state in network.changes["web1"]][-2:] == [State.UNPROBED, State.UNREACHABLE]


@pytest.mark.parametrize("peers", [1, 3, 100])
def test_a_cut_is_seen_and_cleared_within_ten_seconds(peers: int) -> None:
    network, link = one(peers)
    network.run(30)
    assert network.state("web1") is State.OK
    link.up = False
    assert network.until("web1", State.UNREACHABLE, 10) < 10
    network.run(60)
    link.up = True
    assert network.until("web1", State.OK, 10) < 10


@pytest.mark.parametrize("peers", [1, 100])
@pytest.mark.parametrize("mtu", [1362, 1280, 576, 1461, 100])
def test_the_path_mtu_is_found_to_the_byte_and_its_end_too(peers: int, mtu: int) -> None:
    network, link = one(peers)
    network.run(20)
    link.mtu = mtu
    network.until("web1", State.SMALL, 20)
    assert network.scheduler.results()["web1"].path_mtu == mtu
    network.run(120)
    assert network.state("web1") is State.SMALL
    assert network.scheduler.results()["web1"].loss is not None
    link.mtu = FULL
    network.until("web1", State.OK, 30)
    assert network.scheduler.results()["web1"].path_mtu is None


@pytest.mark.parametrize("peers", [1, 100])
def test_the_end_of_a_small_path_mtu_is_seen_within_ten_seconds(peers: int) -> None:
    network, link = one(peers)
    network.run(20)
    link.mtu = 1362
    network.until("web1", State.SMALL, 20)
    network.run(60)
    assert network.state("web1") is State.SMALL
    link.mtu = FULL
    assert network.until("web1", State.OK, 10) < 10


@pytest.mark.parametrize("peers", [1, 100])
def test_a_longer_way_shows_in_the_round_trip_within_ten_seconds_and_one_slow_packet_does_not(peers: int) -> None:
    network, _ = one(peers)
    network.run(30)

    def shown() -> float:
        return network.scheduler.results()["web1"].round_trip or 0.0

    network.trip = 0.041
    network.run(10 if peers > 1 else 2.5)
    assert shown() > 0.03
    network.trip = 0.001
    network.run(30)
    assert shown() < 0.005
    network.trip, before = 0.041, len(network.sent)
    while not any(key == "web1" for _, key in network.sent[before:]):
        network.run(0.05)
    network.trip = 0.001
    network.run(0.5)
    assert shown() < 0.01


def test_probes_of_the_time_before_the_peer_was_there_are_no_loss() -> None:
    network, link = one()
    link.up = False
    network.run(1.1)
    link.up = True
    network.until("web1", State.OK, 10)
    assert network.scheduler._paths["web1"].reach().loss == 0


def test_losses_are_seen_as_losses_and_not_as_a_small_path_mtu() -> None:
    network, link = one(3)
    network.run(20)
    link.loss = 0.3
    network.until("web1", State.LOSSY, 20)
    network.run(120)
    reach = network.scheduler.results()["web1"]
    assert reach.state is State.LOSSY and reach.loss is not None and 0.15 < reach.loss < 0.45
    assert reach.path_mtu is None
    link.loss = 0.0
    network.until("web1", State.OK, 120)


@pytest.mark.parametrize("peers", [1, 3, 100])
def test_a_peer_that_answers_and_does_not_forward_is_told_from_one_that_is_unreachable(peers: int) -> None:
    network, link = one(peers)
    network.run(30)
    link.forwards = False
    assert network.until("web1", State.NOT_FORWARDED, 10) < 10
    network.run(60)
    link.up = False
    network.until("web1", State.UNREACHABLE, 30)
    network.run(60)
    link.up = True
    network.until("web1", State.NOT_FORWARDED, 30)
    network.run(300)
    assert network.state("web1") is State.NOT_FORWARDED
    link.forwards = True
    network.until("web1", State.OK, 30)


@pytest.mark.parametrize("peers", [1, 3, 100])
def test_forwarding_again_is_seen_within_ten_seconds(peers: int) -> None:
    network, link = one(peers)
    network.run(30)
    link.forwards = False
    network.run(60)
    link.forwards = True
    assert network.until("web1", State.OK, 10) < 10


def test_a_peer_that_never_forwarded_is_not_called_well() -> None:
    network, link = one(3)
    link.forwards = False
    assert network.until("web1", State.NOT_FORWARDED, 10) > 0
    assert [state for _, state in network.changes["web1"]] == [State.UNPROBED, State.NOT_FORWARDED]


@pytest.mark.parametrize("late", [0.0, 3.0, 20.0])
def test_a_peer_whose_agent_is_too_old_for_loops_is_judged_by_echoes(late: float) -> None:
    network, link = one(3)
    link.forwards = False
    network.run(late)
    network.scheduler.heard("web1", False, network.now)
    network.until("web1", State.OK, 10)
    network.run(60)
    assert network.state("web1") is State.OK
    reach = network.scheduler.results()["web1"]
    assert reach.loss is not None and reach.loss < 1 and reach.path_mtu is None
    link.mtu = 1400
    network.until("web1", State.SMALL, 20)
    link.mtu, link.forwards = FULL, True
    # upgraded
    network.scheduler.heard("web1", True, network.now)
    network.until("web1", State.OK, 30)
    link.forwards = False
    network.until("web1", State.NOT_FORWARDED, 10)


def test_echoes_are_sent_while_the_own_switch_lets_no_loop_in() -> None:
    network, link = one(3, let_in=False)
    link.forwards = False
    network.run(60)
    assert network.state("web1") is State.OK
    link.up = False
    network.until("web1", State.UNREACHABLE, 10)


def test_a_path_that_carries_only_small_packets_and_then_none_is_unreachable_in_a_large_mesh() -> None:
    network, link = one(400)
    network.run(60)
    link.mtu = 1400
    network.until("web1", State.SMALL, 60)
    link.up = False
    network.until("web1", State.UNREACHABLE, 70)


def test_a_peer_that_comes_back_at_once_is_not_probed_twice_as_often() -> None:
    network, _ = one(3)
    network.run(20)
    for _ in range(5):
        network.scheduler.update({}, network.now)
        network.scheduler.update({name: {name: Wanted(FULL)} for name in network.links}, network.now)
    before = len(network.sent)
    network.run(20)
    assert len(network.sent) - before <= 3 * 41


@pytest.mark.parametrize("late", [0.0, 0.03, 0.4, 2.0])
def test_a_probe_that_leaves_late_expires_all_the_same(late: float) -> None:
    network, link = one()
    link.up, scheduler = False, network.scheduler
    while network.state("web1") is State.UNPROBED:
        for due in scheduler.due(network.now):
            scheduler.left(due.key, due.probe.sequence, network.now + late)
        network.now = scheduler.wake_at(network.now)
        assert network.now < 1010
    assert network.state("web1") is State.UNREACHABLE


def test_all_probes_are_counted_those_of_peers_that_left_too() -> None:
    network, link = one(3)
    network.run(20)
    assert network.scheduler.sent == len(network.sent) and network.scheduler.lost == 0
    link.up = False
    network.run(20)
    lost = network.scheduler.lost
    assert 0 < lost <= network.scheduler.results()["web1"].sent
    network.scheduler.update({"other0": {"other0": Wanted(FULL)}}, network.now)
    assert (network.scheduler.sent, network.scheduler.lost) == (len(network.sent), lost)


@pytest.mark.parametrize("seed", range(8))
def test_a_lossy_path_is_not_called_unreachable(seed: int) -> None:
    dice = random.Random(seed)
    network = Network({"web1": lambda now, probe: dice.random() >= 0.3})
    network.run(600)
    assert State.UNREACHABLE not in {state for _, state in network.changes["web1"]}
    assert State.LOSSY in {state for _, state in network.changes["web1"]}


def test_one_lost_packet_changes_nothing() -> None:
    network, link = one(3)
    network.run(20)
    link.up = False
    network.run(1.05)
    link.up = True
    network.run(30)
    assert [state for _, state in network.changes["web1"]] == [State.UNPROBED, State.OK]


@settings(max_examples=15)
@given(
    loss=st.floats(0.0, 1.0),
    period=st.floats(0.1, 40.0),
    share=st.floats(0.0, 1.0),
    mtu=st.integers(60, FULL),
    drops=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_no_pattern_of_losses_makes_a_state_flap(
    loss: float, period: float, share: float, mtu: int, drops: bool, seed: int
) -> None:
    dice = random.Random(seed)

    def link(now: float, probe: Probe) -> bool:
        bad = (now % period) < period * share
        return not (bad and (dice.random() < loss or probe.size > mtu or (drops and not probe.echo)))

    network = Network({"web1": link})
    network.run(600)
    # the wait doubles with each change for the worse, so ten minutes hold nine of them
    assert len(network.changes["web1"]) <= 24


@settings(max_examples=10)
@given(
    dead=st.integers(0, 30),
    deaf=st.integers(0, 30),
    lossy=st.integers(0, 30),
    good=st.integers(1, 60),
    seed=st.integers(0, 2**32),
)
def test_the_budget_is_kept_and_nobody_is_starved(dead: int, deaf: int, lossy: int, good: int, seed: int) -> None:
    dice = random.Random(seed)
    links: dict[str, Link] = {f"dead{n}": lambda now, probe: False for n in range(dead)}
    links |= {f"deaf{n}": lambda now, probe: probe.echo for n in range(deaf)}
    links |= {f"lossy{n}": lambda now, probe: dice.random() < 0.7 for n in range(lossy)}
    links |= {f"good{n}": lambda now, probe: True for n in range(good)}
    network = Network(links)
    network.run(60)
    first = network.sent[0][0]
    for start in range(58):
        assert sum(start <= at - first < start + 1 for at, _ in network.sent) <= 2 * RATE
    assert len(network.sent) <= RATE * 61
    for name in links:
        times = [at for at, key in network.sent if key == name]
        gaps = [b - a for a, b in zip([first, *times], [*times, network.now], strict=True)]
        assert max(gaps) <= 2 * max(5.0, len(links) / RATE * 2) + 1.5, f"{name}: {max(gaps):.1f} s without a probe"
    assert all(network.state(name) is State.OK for name in links if name.startswith("good"))


def test_a_path_that_carries_more_again_is_measured_again_and_at_last_not_limited() -> None:
    network, link = one()
    network.run(30)
    assert network.scheduler.path_mtus() == {"web1": None}
    for size in (1300, 1400, 1350, FULL - 1):
        link.mtu = size
        network.run(60)
        assert network.scheduler.path_mtus() == {"web1": size}, network.state("web1")
    link.up = False
    network.run(30)
    assert network.scheduler.path_mtus() == {}
    link.up, link.mtu = True, 1300
    # nothing is believed at once of a path that has changed so often
    network.run(400)
    assert network.scheduler.path_mtus() == {"web1": 1300}
    link.mtu = FULL
    network.run(400)
    assert network.scheduler.path_mtus() == {"web1": None}


def test_a_peer_with_a_smaller_mtu_is_well_at_that() -> None:
    network, link = one()
    link.mtu = 1366
    network.run(30)
    assert network.state("web1") is State.SMALL
    network.scheduler.heard_mtu("web1", 1362, network.now)
    network.run(30)
    assert network.state("web1") is State.OK
    assert network.scheduler.path_mtus() == {"web1": 1362}
    assert network.scheduler.results()["web1"].path_mtu == 1362
    # a path that carries still less is no matter of the two ends
    link.mtu = 1300
    network.run(60)
    assert network.state("web1") is State.SMALL and network.scheduler.path_mtus() == {"web1": 1300}
    link.mtu = FULL
    network.scheduler.heard_mtu("web1", 9000, network.now)
    network.run(60)
    assert network.state("web1") is State.OK and network.scheduler.path_mtus() == {"web1": None}
    network.scheduler.heard_mtu("stranger", 1300, network.now)


def test_a_path_mtu_that_changes_is_a_change_though_the_state_stays() -> None:
    network, link = one()
    link.mtu = 1400
    network.run(60)
    network.scheduler.changed, link.mtu = False, 1300
    network.run(60)
    assert network.scheduler.changed and network.state("web1") is State.SMALL


def test_random_losses_make_no_path_mtu() -> None:
    network, link = one()
    network.run(30)
    link.loss = 0.4
    for _ in range(60):
        network.run(10)
        assert network.scheduler.path_mtus().get("web1") is None
