"""The MeshNode says how its node is, in few writes. Time passes only where a test says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from ovsmesh.agent import meshnode
from ovsmesh.agent.meshnode import AT_LEAST, CHECK, EVERY, MeshNodeWriter
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


def written(writer: MeshNodeWriter, converged: bool = True, **about: str) -> int:
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
    assert writer.writes <= 10
    until_idle(writer, clock, FLIP)
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
