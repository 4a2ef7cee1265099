"""The lease has one holder at most, the events are few; on a stub and on a real API server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.kube import client
from ovsmesh.kube.client import Api
from ovsmesh.kube.config import load
from ovsmesh.kube.events import EventRecorder, ObjectReference
from ovsmesh.kube.leader_election import LeaderElector, Timing
from tests.support import apikit
from tests.support.apikit import THINGS
from tests.support.controlplane import ControlPlane
from tests.support.kubekit import eventually
from tests.support.kubestub import Stub

stub = pytest.fixture(apikit.make_stub)
api = pytest.fixture(apikit.make_api)
real = pytest.fixture(apikit.make_real)


Candidate = Callable[..., LeaderElector]


@pytest.fixture
def lease_of() -> Iterator[Candidate]:
    """apikit.lease_of; what it gives ends with the test, however that ends."""
    with ExitStack() as ending:

        def make(*arguments: Any) -> LeaderElector:
            made = apikit.lease_of(*arguments)
            ending.callback(made.close)
            return made

        yield make


# ---------------------------------------------------------------- the lease


def test_one_leads_and_the_next_takes_over_when_it_is_given_back(stub: Stub, api: Api, lease_of: Candidate) -> None:
    told: list[str] = []
    times = Timing(duration=30, deadline=20, retry=0.2)
    a, b = lease_of(api, "a", told, times), lease_of(api, "b", told, times)
    a.start()
    eventually(lambda: told == ["a on"])
    b.start()
    eventually(lambda: b.holder == "a")
    time.sleep(1.0)
    assert told == ["a on"]
    assert not b.is_leader
    a.close()
    assert a.remaining() == 0
    eventually(lambda: told == ["a on", "a off", "b on"], 15)  # long before it would run out
    b.close()


def test_who_can_t_renew_is_out_before_another_is_in(stub: Stub, api: Api, tmp_path: Path, lease_of: Candidate) -> None:
    told: list[str] = []
    cut_off = Stub(tmp_path / "other")  # the same lease, behind a door that is closed below
    cut_off.objects, cut_off.history = stub.objects, stub.history
    a = lease_of(Api(load(cut_off.kubeconfig()), timeout=1.0), "a", told)
    b = lease_of(api, "b", told)
    a.start()
    eventually(lambda: told == ["a on"])
    b.start()
    time.sleep(0.5)
    stub.version = cut_off.version
    cut_off.down()
    # on a busy machine a candidate may lose the lease to the clock before, and take it again
    eventually(lambda: told[-1] == "b on", why=lambda: told)
    assert all(now == before.replace("on", "off") for before, now in zip(told[::2], told[1::2], strict=False)), told
    assert not (a.is_leader and b.is_leader)


def test_a_holder_that_stalls_is_fenced_off_by_the_clock_alone(stub: Stub, api: Api, lease_of: Candidate) -> None:
    told: list[str] = []
    a = lease_of(api, "a", told)
    fenced = api.fenced(a.remaining)
    a.start()
    eventually(lambda: told == ["a on"])
    fenced.create(THINGS, {"metadata": {"name": "x"}})
    stub.delay = 3.0  # the renewal hangs
    time.sleep(1.5)
    with pytest.raises(client.NotLeader):
        fenced.create(THINGS, {"metadata": {"name": "y"}})
    stub.delay = 0.0
    eventually(lambda: told == ["a on", "a off", "a on"])
    a.close()


# ---------------------------------------------------------------- events

EVENTS = "/api/v1/namespaces/default/events"


def test_repeats_are_counted_and_floods_are_cut_off(stub: Stub, api: Api) -> None:
    events = EventRecorder(api, "ovsmesh-controller", "c-1", repeat=0.4)
    events.start()
    node = ObjectReference("v1", "Node", "n1", "uid-1")
    for _ in range(50):
        events.record(node, "PodCIDRMissing", "give it one")
    eventually(lambda: [e["count"] for p, e in stub.objects.items() if p.startswith(EVENTS)] == [50])
    assert stub.count("POST") == 1
    assert stub.count("PATCH") <= 2
    for n in range(100):
        events.record(node, "Flood", f"number {n}")
    events.close(5.0)
    assert len([p for p in stub.objects if p.startswith(EVENTS)]) <= 26
    assert events.dropped >= 74


def test_events_never_hold_anyone_up(stub: Stub, api: Api) -> None:
    stub.down()
    events = EventRecorder(api.within(0.5), "c", "c-1")
    events.start()
    began = time.monotonic()
    for n in range(3000):
        events.record(ObjectReference("v1", "Node", f"n{n}"), "Reason", "text")
    assert time.monotonic() - began < 10  # a wait for each would take 25 minutes
    events.close(0.1)


# ---------------------------------------------------------------- a real API server


@pytest.mark.kube
def test_a_real_lease_changes_hands(real: Api, lease_of: Candidate) -> None:
    told: list[str] = []
    a, b = lease_of(real, "a", told), lease_of(real, "b", told)
    a.start()
    eventually(lambda: told == ["a on"])
    b.start()
    time.sleep(1.0)
    a.close()
    # a busy machine may let the lease run out before
    eventually(lambda: told[-2:] == ["a off", "b on"], why=lambda: told)
    b.close()
    spec = real.get("/apis/coordination.k8s.io/v1/namespaces/ovsmesh/leases/ovsmesh-controller")["spec"]
    assert spec["leaseTransitions"] == told.count("b on") + told.count("a on") - 1


@pytest.mark.kube
def test_a_real_event_is_shown_on_its_node(cluster: ControlPlane, real: Api) -> None:
    node = real.create("/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})
    events = EventRecorder(real, "ovsmesh-controller", "c-1", repeat=0.5)
    events.start()
    about = ObjectReference("v1", "Node", "n1", node["metadata"]["uid"])
    for _ in range(3):
        events.record(about, "PodCIDRMissing", "node n1 has no podCIDR")
    events.close(5.0)
    text = cluster.kubectl("describe", "node", "n1")
    assert "PodCIDRMissing" in text
    assert "x3" in text
