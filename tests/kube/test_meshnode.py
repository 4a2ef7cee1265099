"""The MeshNode says how its node is, in few writes. Time passes only where a test says so."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from ovsmesh.agent import meshnode
from ovsmesh.agent.meshnode import AT_LEAST, CHECK, EVERY, MeshNodeWriter
from ovsmesh.dataplane.types import Reach, State
from ovsmesh.kube.client import Api, Object
from ovsmesh.kube.config import load
from ovsmesh.names import MESH_NODES
from tests.support import slicekit
from tests.support.kubekit import eventually
from tests.support.kubestub import Stub
from tests.support.slicekit import published

stub = pytest.fixture(slicekit.make_stub)
PATH = f"{MESH_NODES}/n0"
FLIP = meshnode._FLIP


class Clock:
    """Monotonic seconds that pass when a test adds to them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def api(stub: Stub) -> Iterator[Api]:
    with closing(Api(load(stub.kubeconfig()), timeout=2.0)) as made:
        yield made


@pytest.fixture
def writer(api: Api, clock: Clock) -> Iterator[MeshNodeWriter]:
    """A writer without its thread: a test calls step() instead."""
    with closing(MeshNodeWriter(api, "n0", lambda: {"default-000": "7"}, clock=clock)) as made:
        yield made


def status(stub: Stub) -> Object:
    return stub.objects.get(PATH, {}).get("status") or {}


def condition(stub: Stub, kind: str) -> Object:
    return next((c for c in status(stub).get("conditions", ()) if c["type"] == kind), {})


def owner(stub: Stub) -> str:
    (found,) = stub.objects[PATH]["metadata"]["ownerReferences"]
    return str(found["uid"])


def written(writer: MeshNodeWriter, converged: bool = True, **about: Any) -> int:
    """Publish, do what is due, and return how many writes there were until now."""
    writer.publish(published(converged, **about))
    writer.step()
    return writer.writes


def until_idle(writer: MeshNodeWriter, clock: Clock, seconds: float) -> None:
    """Let so many seconds pass as the writer's thread would: it acts when it said that something may be due."""
    end = clock.now + seconds
    pause = writer.step()
    for _ in range(1000):
        if pause is None or clock.now + pause > end:
            clock.now = end
            return
        clock.now += pause
        pause = writer.step()
    pytest.fail("the writer does not rest")


def test_a_meshnode_is_made_and_belongs_to_its_node(stub: Stub, writer: MeshNodeWriter) -> None:
    assert written(writer) == 1
    found = status(stub)
    assert found["observedSlices"] == {"default-000": "7"}
    assert found["peers"] == {"wanted": 1, "installed": 0, "up": 0}
    assert found["mtu"] == 1462
    assert found["versions"]["ovs"] == "3.1.0"
    assert condition(stub, "Converged")["status"] == "True"
    owners = stub.objects[PATH]["metadata"]["ownerReferences"]
    assert owners == [{"apiVersion": "v1", "kind": "Node", "name": "n0", "uid": "u0"}]


def test_changes_that_flip_nothing_are_gathered(stub: Stub, writer: MeshNodeWriter, clock: Clock) -> None:
    written(writer)
    for second in range(int(AT_LEAST * 0.8) - 1):
        clock.now += 1
        assert written(writer, ovs=f"2.{second}") == 1
    until_idle(writer, clock, AT_LEAST)
    assert writer.writes == 2 and status(stub)["versions"]["ovs"] == f"2.{second}"


def test_without_a_change_it_is_written_every_five_minutes(writer: MeshNodeWriter, clock: Clock) -> None:
    written(writer)
    until_idle(writer, clock, EVERY * 0.8 - 1)
    assert writer.writes == 1
    until_idle(writer, clock, EVERY * 0.2 + 1)
    assert writer.writes == 2
    until_idle(writer, clock, 10 * EVERY)
    assert 12 <= writer.writes <= 14


def test_a_condition_that_flips_is_written_long_before_the_rest(
    stub: Stub, writer: MeshNodeWriter, clock: Clock
) -> None:
    written(writer)
    clock.now += FLIP
    assert written(writer, False) == 2
    assert condition(stub, "Converged")["status"] == "False"
    assert condition(stub, "Converged")["reason"] == "Pending"


def test_a_flapping_node_does_not_write_at_each_flap(stub: Stub, writer: MeshNodeWriter, clock: Clock) -> None:
    for flap in range(100):
        written(writer, bool(flap % 2))
        clock.now += FLIP / 10
    assert writer.writes <= 7
    until_idle(writer, clock, meshnode._REFILL)
    assert condition(stub, "Converged")["status"] == "True"


@pytest.mark.parametrize("check", [meshnode._FIRST_CHECK, CHECK], ids=["just made", "later"])
def test_a_meshnode_deleted_by_hand_is_made_again(
    stub: Stub, writer: MeshNodeWriter, clock: Clock, check: float
) -> None:
    if check == CHECK:
        stub.put(PATH, {})
    written(writer)
    stub.remove(PATH)
    until_idle(writer, clock, check * 0.7)
    assert not status(stub)
    until_idle(writer, clock, check * 0.3)
    assert owner(stub) == "u0" and status(stub) and writer.writes == 2
    # shorter than from the earliest check to the earliest write after it
    until_idle(writer, clock, EVERY * 0.5)
    assert writer.writes == 2


@pytest.mark.parametrize(
    "edit",
    [
        {"mtu": 9},
        {"peers": {"wanted": 7, "installed": 7, "up": 7}},
        {"conditions": []},
        {"observedSlices": {"default-000": "7", "default-999": "1"}},
        {"observedSlices": None},
        {"versions": None},
        {"observedAt": "2020-01-01T00:00:00Z"},
    ],
    ids=lambda edit: next(iter(edit)),
)
def test_a_meshnode_edited_by_hand_is_put_right(stub: Stub, writer: MeshNodeWriter, clock: Clock, edit: Object) -> None:
    written(writer)
    before = status(stub)
    found = stub.objects[PATH]
    found["status"] = {key: value for key, value in {**before, **edit}.items() if value is not None}
    clock.now += meshnode._FIRST_CHECK
    writer.step()
    writer.step()
    assert writer.writes == 2
    same = {"observedAt": "", "conditions": ""}
    assert status(stub) | same == before | same
    states = [{c["type"]: c["status"] for c in told["conditions"]} for told in (status(stub), before)]
    assert states[0] == states[1]


def test_what_is_as_it_was_written_is_not_written_again(stub: Stub, writer: MeshNodeWriter, clock: Clock) -> None:
    written(writer)
    reads = stub.count("GET")
    until_idle(writer, clock, EVERY * 0.8 - 1)
    assert stub.count("GET") == reads + 1 and writer.writes == 1


# what the probes found


def peers(count: int, **changed: Reach) -> dict[str, Reach]:
    """What is known of peers p0, p1, …: all is well, but with those that are `changed`."""
    return {f"p{n}": Reach(State.OK, 1000.0, 0.0004, 0.001, 0.0) for n in range(count)} | changed


LOST = Reach(State.UNREACHABLE, 1000.0, 0.0004)


def test_counts_worst_round_trip_and_path_mtu_are_in_the_meshnode(stub: Stub, writer: MeshNodeWriter) -> None:
    slow, small = Reach(State.OK, 1000.0, 0.0412), Reach(State.SMALL, 1000.0, 0.001, path_mtu=1362)
    gone = replace(LOST, round_trip=7.0)
    written(writer, reach=peers(12, p1=slow, p2=small, p3=gone, p4=Reach()))
    found = status(stub)["reachability"]
    assert (found["reachable"], found["unreachable"], found["unprobed"]) == ("9/12", 1, 1)
    assert (found["worstRoundTrip"], found["pathMTU"]) == ("41 ms", 1362)
    since = "1970-01-01T00:16:40Z"
    assert [(p["name"], p["state"], p["since"]) for p in found["worstPeers"]] == [
        ("p2", "small packets only", since),
        ("p3", "unreachable", since),
    ]
    assert "GRE" in found["worstPeers"][1]["cause"]


def test_what_is_not_known_any_more_leaves_the_meshnode(stub: Stub, writer: MeshNodeWriter, clock: Clock) -> None:
    written(writer, reach=peers(2))
    assert {"worstRoundTrip", "pathMTU"} <= status(stub)["reachability"].keys()
    clock.now += AT_LEAST
    written(writer, reach=peers(2, p0=LOST, p1=LOST))
    assert status(stub)["reachability"].keys() == {"reachable", "unreachable", "unprobed", "worstPeers"}


def test_ten_of_many_lost_peers_are_named_and_at_each_node_others(stub: Stub, writer: MeshNodeWriter) -> None:
    lost = {f"p{n}": LOST for n in range(5, 45)}
    written(writer, reach=peers(100, p1=Reach(State.LOSSY, 1.0, 0.1), **lost))
    found = status(stub)["reachability"]
    names = [peer["name"] for peer in found["worstPeers"]]
    assert found["unreachable"] == 40 and len(names) == 10 and set(names) < set(lost)
    assert names == sorted(names) != sorted(lost)[:10]


def test_a_node_at_rest_writes_no_more_often_for_its_probes(writer: MeshNodeWriter, clock: Clock) -> None:
    """Round trips and loss change with every probe."""
    lossy = Reach(State.LOSSY, 1000.0, 0.001, loss=0.3)
    draw = random.Random(7)
    for more in ({}, {"p7": lossy, "p8": LOST}):
        start = writer.writes
        written(writer, reach=peers(20, **more))
        for _ in range(int(EVERY)):
            clock.now += 10.0
            drawn = {
                name: replace(one, round_trip=draw.uniform(0.0001, 0.5), loss=draw.random(), since=draw.random())
                for name, one in peers(20, **more).items()
            }
            written(writer, reach=drawn)
        assert 9 <= writer.writes - start <= 14, more


def test_a_lost_peer_and_its_return_are_written_at_once(stub: Stub, writer: MeshNodeWriter, clock: Clock) -> None:
    written(writer, reach=peers(12, p1=LOST))
    for number, (lost, count) in enumerate([({"p1": LOST, "p2": LOST}, 2), ({"p2": LOST}, 1), ({}, 0)], 2):
        clock.now += FLIP
        assert written(writer, reach=peers(12, **lost)) == number
        assert status(stub)["reachability"]["unreachable"] == count


def test_peers_that_flap_cause_few_writes_and_fewer_in_a_large_mesh(writer: MeshNodeWriter, clock: Clock) -> None:
    for count, most in ((12, 4 + 24), (400, 4 + 10)):
        start = writer.writes
        for flap in range(120):
            written(writer, reach=peers(count, **({"p2": LOST, "p3": LOST} if flap % 2 else {"p3": LOST})))
            clock.now += FLIP
        assert writer.writes - start <= most + 1
        clock.now += EVERY


def test_a_node_that_cannot_reach_most_others_goes_on_to_say_so(writer: MeshNodeWriter, clock: Clock) -> None:
    """Others may be silent: its own word counts while it is fresh."""
    written(writer, reach=peers(3, p0=LOST, p1=LOST))
    until_idle(writer, clock, 10 * AT_LEAST + 1)
    assert 10 <= writer.writes <= 12


def test_an_api_server_that_hangs_does_not_hold_the_loop_up(stub: Stub) -> None:
    ended = threading.Event()
    with closing(Api(load(stub.kubeconfig()), timeout=60.0)) as api, closing(MeshNodeWriter(api, "n0", dict)) as hung:

        def loop() -> None:
            hung.publish(published(ovs="2"))
            hung.idle()
            ended.set()

        with stub.changed:  # the stub answers nobody meanwhile
            hung.start().publish(published())
            eventually(lambda: stub.count("GET") == 1)
            threading.Thread(target=loop, daemon=True).start()
            assert ended.wait(30.0), "publish() waits for the API server"
        eventually(lambda: status(stub))


def test_an_api_server_away_is_told_later(stub: Stub, writer: MeshNodeWriter, clock: Clock) -> None:
    stub.down()
    assert written(writer) == 0
    until_idle(writer, clock, 120)
    assert writer.writes == 0
    stub.up()
    until_idle(writer, clock, 60)
    assert writer.writes == 1 and status(stub)


def test_attempts_become_fewer_while_the_api_server_refuses(stub: Stub, writer: MeshNodeWriter, clock: Clock) -> None:
    stub.answers = [(500, b"{}", {})] * 1000
    written(writer)
    until_idle(writer, clock, 600)
    assert 10 <= 1000 - len(stub.answers) <= 40


def test_the_next_run_goes_on_where_the_last_left_off(stub: Stub, writer: MeshNodeWriter) -> None:
    stamp = "2020-01-01T00:00:00Z"
    old = {"observedSlices": {"default-000": "1", "default-001": "1"}}
    old["conditions"] = [{"type": "Converged", "status": "True", "lastTransitionTime": stamp}]  # type: ignore[assignment]
    stub.put(PATH, {})
    stub.objects[PATH]["status"] = old
    assert written(writer) == 1
    assert condition(stub, "Converged")["lastTransitionTime"] == stamp
    assert status(stub)["observedSlices"] == {"default-000": "7"}


def test_the_meshnode_of_an_earlier_node_is_not_taken_over(stub: Stub, writer: MeshNodeWriter, clock: Clock) -> None:
    """It goes with its Node soon: what is written into it would be lost, and not written again for minutes."""
    old = {"apiVersion": "v1", "kind": "Node", "name": "n0", "uid": "u-before"}
    stub.put(PATH, {}, ownerReferences=[old])
    written(writer)
    until_idle(writer, clock, 20)
    assert stub.count("GET", "/n0") >= 4 and writer.writes == 0 and not status(stub)
    stub.remove(PATH)
    until_idle(writer, clock, meshnode._GONE)
    assert owner(stub) == "u0" and condition(stub, "Converged")


def test_a_node_made_again_under_a_running_agent_gets_its_own_meshnode_at_once(
    stub: Stub, writer: MeshNodeWriter
) -> None:
    written(writer)
    stub.remove(PATH)
    assert written(writer, uid="u-new") == 2
    assert owner(stub) == "u-new" and condition(stub, "Converged")["status"] == "True"


def test_the_thread_writes_what_is_published(stub: Stub, api: Api) -> None:
    with closing(MeshNodeWriter(api, "n0", dict, at_least=0.1, every=0.2).start()) as writer:
        writer.publish(published())
        eventually(lambda: writer.writes >= 3)
