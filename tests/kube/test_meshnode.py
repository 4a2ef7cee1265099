"""The MeshNode says how its node is, in few writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from ovsmesh.agent.meshnode import MeshNodeWriter
from ovsmesh.agent.result import AgentCounters
from ovsmesh.kube.client import Api, Object
from ovsmesh.kube.config import load
from ovsmesh.names import MESH_NODES
from tests.support import slicekit
from tests.support.kubekit import eventually
from tests.support.kubestub import Stub
from tests.support.slicekit import turn

stub = pytest.fixture(slicekit.make_stub)

Writer = Callable[..., MeshNodeWriter]


@pytest.fixture
def writer(stub: Stub) -> Iterator[Writer]:
    made: list[MeshNodeWriter] = []
    with closing(Api(load(stub.kubeconfig()), timeout=2.0)) as api:

        def make(**options: float) -> MeshNodeWriter:
            made.append(MeshNodeWriter(api, "n0", lambda: {"default-000": "7"}, **options))
            return made[-1]

        yield make
        for each in made:
            each.close()


def meshnode(stub: Stub) -> Object:
    found = stub.objects.get(f"{MESH_NODES}/n0", {})
    return found.get("status") or {}


def condition(stub: Stub, kind: str) -> Object:
    return next((c for c in meshnode(stub).get("conditions", ()) if c["type"] == kind), {})


def test_a_meshnode_is_made_and_belongs_to_its_node(stub: Stub, writer: Writer) -> None:
    writer().publish(turn(), AgentCounters(ovs_version="3.1.0"))
    eventually(lambda: meshnode(stub))
    status = meshnode(stub)
    assert status["observedSlices"] == {"default-000": "7"}
    assert status["peers"] == {"wanted": 1, "installed": 0, "up": 0}
    assert status["mtu"] == 1462
    assert status["versions"]["ovs"] == "3.1.0"
    assert condition(stub, "Converged")["status"] == "True"
    owner = stub.objects[f"{MESH_NODES}/n0"]["metadata"]["ownerReferences"]
    assert owner == [{"apiVersion": "v1", "kind": "Node", "name": "n0", "uid": "u0"}]


def test_writes_are_few(stub: Stub, writer: Writer) -> None:
    made = writer(at_least=1.0, every=300.0, flip=0.3)
    made.publish(turn(), AgentCounters(ovs_version="1"))
    eventually(lambda: made.writes == 1)
    for n in range(20):  # something changes, nothing flips
        made.publish(turn(), AgentCounters(ovs_version=f"2.{n}"))
        time.sleep(0.02)
    assert made.writes == 1
    eventually(lambda: made.writes == 2, 20)
    assert meshnode(stub)["versions"]["ovs"] == "2.19"
    time.sleep(1.2)
    assert made.writes == 2


def test_a_condition_that_flips_is_written_long_before_the_rest(stub: Stub, writer: Writer) -> None:
    made = writer(at_least=300.0, every=300.0, flip=0.1)
    made.publish(turn(), AgentCounters())
    eventually(lambda: made.writes == 1)
    made.publish(turn(False), AgentCounters())
    eventually(lambda: condition(stub, "Converged")["status"] == "False", 20, 0.005)
    assert condition(stub, "Converged")["reason"] == "Pending"


def test_nothing_new_is_written_now_and_then_all_the_same(stub: Stub, writer: Writer) -> None:
    made = writer(at_least=0.1, every=0.5, flip=0.1)
    made.publish(turn(), AgentCounters())
    eventually(lambda: made.writes == 4, 20)


def test_a_flapping_node_does_not_write_at_each_flap(stub: Stub, writer: Writer) -> None:
    made, began = writer(flip=0.5), time.monotonic()
    for n in range(100):
        made.publish(turn(bool(n % 2)), AgentCounters())
        time.sleep(0.01)
    assert made.writes <= 2 + (time.monotonic() - began) / 0.5
    eventually(lambda: condition(stub, "Converged")["status"] == "True", 20)


def test_a_meshnode_deleted_by_hand_is_made_again(stub: Stub, writer: Writer) -> None:
    made = writer(at_least=0.2, every=0.4)
    made.publish(turn(), AgentCounters())
    eventually(lambda: meshnode(stub))
    stub.remove(f"{MESH_NODES}/n0")
    eventually(lambda: meshnode(stub))


def test_a_meshnode_deleted_by_hand_is_back_long_before_the_next_routine_write(stub: Stub, writer: Writer) -> None:
    made = writer(check=0.3)
    made.publish(turn(), AgentCounters())
    eventually(lambda: meshnode(stub))
    stub.remove(f"{MESH_NODES}/n0")
    eventually(lambda: meshnode(stub))
    assert stub.objects[f"{MESH_NODES}/n0"]["metadata"]["ownerReferences"]
    time.sleep(0.5)
    assert made.writes == 2


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
def test_a_meshnode_edited_by_hand_is_put_right(stub: Stub, writer: Writer, edit: Object) -> None:
    made = writer(check=0.3)
    made.publish(turn(), AgentCounters())
    eventually(lambda: meshnode(stub))
    before = meshnode(stub)
    found = stub.objects[f"{MESH_NODES}/n0"]
    found["status"] = {key: value for key, value in {**before, **edit}.items() if value is not None}
    eventually(lambda: made.writes == 2)
    same = {"observedAt": "", "conditions": ""}
    assert meshnode(stub) | same == before | same
    states = [{c["type"]: c["status"] for c in told["conditions"]} for told in (meshnode(stub), before)]
    assert states[0] == states[1]


def test_what_is_as_it_was_written_is_not_written_again(stub: Stub, writer: Writer) -> None:
    made = writer(check=0.1)
    made.publish(turn(), AgentCounters())
    eventually(lambda: stub.count("GET") > 5, 5)
    assert made.writes == 1


def test_an_api_server_away_holds_nobody_up_and_is_told_later(stub: Stub, writer: Writer) -> None:
    stub.down()
    made = writer()
    began = time.monotonic()
    made.publish(turn(), AgentCounters())
    made.flush()
    assert time.monotonic() - began < 1.5  # the API's own time limit is 2 s
    time.sleep(0.5)
    stub.up()
    eventually(lambda: meshnode(stub), 10)


def test_the_next_run_goes_on_where_the_last_left_off(stub: Stub, writer: Writer) -> None:
    stamp = "2020-01-01T00:00:00Z"
    old = {"observedSlices": {"default-000": "1", "default-001": "1"}}
    old["conditions"] = [{"type": "Converged", "status": "True", "lastTransitionTime": stamp}]  # type: ignore[assignment]
    stub.put(f"{MESH_NODES}/n0", {})
    stub.objects[f"{MESH_NODES}/n0"]["status"] = old
    made = writer()
    made.publish(turn(), AgentCounters())
    eventually(lambda: made.writes)
    assert condition(stub, "Converged")["lastTransitionTime"] == stamp
    assert meshnode(stub)["observedSlices"] == {"default-000": "7"}


def test_the_meshnode_of_an_earlier_node_is_not_taken_over(stub: Stub, writer: Writer) -> None:
    """It is about to go with its Node: what is written into it would be lost, and not told again for minutes."""
    old = {"apiVersion": "v1", "kind": "Node", "name": "n0", "uid": "u-before"}
    stub.put(f"{MESH_NODES}/n0", {}, ownerReferences=[old])
    made = writer()
    made.publish(turn(), AgentCounters())
    eventually(lambda: stub.count("GET", "/n0") >= 2, 5)
    assert not meshnode(stub)
    stub.remove(f"{MESH_NODES}/n0")
    eventually(lambda: condition(stub, "Converged"), 10)
    assert stub.objects[f"{MESH_NODES}/n0"]["metadata"]["ownerReferences"][0]["uid"] == "u0"


def test_a_node_made_again_under_a_running_agent_gets_its_own_meshnode_soon(stub: Stub, writer: Writer) -> None:
    made = writer()
    made.publish(turn(), AgentCounters())
    eventually(lambda: made.writes == 1)
    stub.remove(f"{MESH_NODES}/n0")
    made.publish(turn(uid="u-new"), AgentCounters())
    eventually(lambda: made.writes == 2, 5)
    assert stub.objects[f"{MESH_NODES}/n0"]["metadata"]["ownerReferences"][0]["uid"] == "u-new"
    assert condition(stub, "Converged")["status"] == "True"
