"""The reflector: a copy that is never a part, whatever the server does; the real one too."""

from __future__ import annotations

import json
import time
from functools import partial
from typing import Any

import pytest

from ovsmesh.kube import client
from ovsmesh.kube import reflector as module
from ovsmesh.kube.client import Api
from ovsmesh.kube.reflector import Reflector
from ovsmesh.wakeup import Wakeup
from tests.support import apikit
from tests.support.apikit import THINGS, Watch, items
from tests.support.controlplane import APISERVER, ETCD, ControlPlane
from tests.support.kubekit import eventually
from tests.support.kubestub import Stub

stub = pytest.fixture(apikit.make_stub)
api = pytest.fixture(params=apikit.TRANSPORTS)(apikit.make_api)
watch = pytest.fixture(apikit.make_watch)
real = pytest.fixture(apikit.make_real)


def test_what_changes_is_followed(stub: Stub, watch: Watch) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})
    reflector = watch()
    eventually(lambda: reflector.collection().current)
    assert items(reflector) == {"a": 1}
    before = reflector.collection()
    assert reflector.collection() is before
    stub.put(f"{THINGS}/b", {"n": 2})
    eventually(lambda: items(reflector) == {"a": 1, "b": 2})
    assert dict(before.items) == {"a": 1}
    stub.remove(f"{THINGS}/a")
    eventually(lambda: items(reflector) == {"b": 2})
    assert reflector.collection().lists == 1


def test_an_object_that_changes_nothing_that_is_kept_wakes_nobody(stub: Stub, watch: Watch) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})
    reflector = watch()
    eventually(lambda: reflector.collection().current)
    reflector._wakeup.clear()
    before, events = reflector.collection(), reflector.events
    for beat in range(20):
        stub.put(f"{THINGS}/a", {"n": 1, "heartbeat": beat})
    eventually(lambda: reflector.events == events + 20)
    assert not reflector._wakeup.clear()
    assert reflector.collection() is before


@pytest.mark.parametrize("fault", ["410", "410 event", "500 event", "garbage", "no object", "no name", "unknown type"])
def test_what_may_have_lost_something_is_listed_again(stub: Stub, watch: Watch, fault: str) -> None:
    stub.faults = [fault]
    stub.put(f"{THINGS}/a", {"n": 1})
    reflector = watch()
    eventually(lambda: reflector.collection().lists == 2 and reflector.collection().current)
    stub.put(f"{THINGS}/b", {"n": 2})
    eventually(lambda: items(reflector) == {"a": 1, "b": 2})


@pytest.mark.parametrize("fault", ["half", "cut", "end", "stall"])
def test_what_only_ended_is_watched_again_from_where_it_was(stub: Stub, watch: Watch, fault: str) -> None:
    stub.faults = [fault]
    stub.put(f"{THINGS}/a", {"n": 1})
    reflector = watch(silence=0.5)
    eventually(lambda: stub.count("WATCH") >= 1)
    stub.put(f"{THINGS}/b", {"n": 2})
    eventually(lambda: items(reflector) == {"a": 1, "b": 2})
    assert reflector.collection().lists == 1


def test_a_server_that_cuts_every_watch_is_not_hammered(stub: Stub, watch: Watch) -> None:
    stub.faults = ["cut"] * 1000
    watch()
    time.sleep(3.0)
    # a uniform wait up to 0.4, 0.8, 1.6 … s: the client's own informer calls 2,433 times in 3 s
    assert 2 <= stub.count("WATCH") <= 40


def test_what_is_there_stays_while_the_server_is_away(stub: Stub, watch: Watch) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})
    reflector = watch()
    eventually(lambda: reflector.collection().current)
    stub.down()
    eventually(lambda: reflector.collection().problem)
    assert reflector.collection().synced
    assert items(reflector) == {"a": 1}
    stub.put(f"{THINGS}/a", {"n": 7})
    stub.up()
    eventually(lambda: items(reflector) == {"a": 7} and not reflector.collection().problem)
    assert reflector.collection().lists == 1


def test_an_empty_answer_in_place_of_a_list_removes_nothing(stub: Stub, watch: Watch) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})
    stub.faults = ["", "410 event"]
    reflector = watch()
    eventually(lambda: reflector.collection().current)
    stub.answers = [(200, b"{}", {}), (200, b'{"items": [], "metadata": {}}', {}), (200, b'{"items": 3}', {})]
    stub.cut_all()
    eventually(lambda: not stub.answers and reflector.collection().lists == 2)
    assert items(reflector) == {"a": 1}


def test_a_list_that_ends_between_two_pages_is_begun_again(stub: Stub, watch: Watch) -> None:
    for n in range(5):
        stub.put(f"{THINGS}/t{n}", {"n": n})
    first = json.dumps(
        {"items": [stub.objects[f"{THINGS}/t0"]], "metadata": {"resourceVersion": "1", "continue": "x"}}
    ).encode()
    stub.answers = [(200, first, {}), (410, b"{}", {})]
    reflector = watch(limit=2)
    seen: list[int] = []

    def synced() -> bool:
        seen.append(len(items(reflector)))
        return reflector.collection().synced

    eventually(synced)
    assert set(seen) <= {0, 5}
    assert len(items(reflector)) == 5


def test_an_object_that_can_t_be_read_keeps_its_last_good_state(stub: Stub, watch: Watch) -> None:
    stub.put(f"{THINGS}/a", {"n": 1})
    reflector = watch()
    eventually(lambda: reflector.collection().current)
    stub.put(f"{THINGS}/a", {"n": "x"})
    stub.put(f"{THINGS}/b", None)
    stub.put(f"{THINGS}/c", {"n": 3})
    eventually(lambda: items(reflector) == {"a": 1, "c": 3})


def test_how_long_the_server_asks_to_wait_is_waited(stub: Stub, watch: Watch) -> None:
    stub.answers = [(429, b"", {"Retry-After": "1"})]
    reflector = watch()
    eventually(lambda: reflector.collection().synced)
    (first, *_), (second, *_) = stub.log[:2]
    assert 1.0 <= second - first < 2.0


def test_a_watch_that_the_server_ends_in_time_is_no_trouble(stub: Stub, watch: Watch, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_HEALTHY", 0.5)
    reflector = watch(seconds=1)
    eventually(lambda: stub.count("WATCH") == 3)
    assert not reflector.collection().problem
    assert reflector.collection().lists == 1


# ---------------------------------------------------------------- a real API server


@pytest.mark.kube
def test_a_real_server_is_listed_and_watched(real: Api) -> None:
    api, wakeup = real, Wakeup()
    path = "/api/v1/nodes"
    for n in range(7):
        api.create(path, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"n{n}"}})
    reflector: Reflector[str] = Reflector(api, path, lambda found: found["metadata"]["uid"], wakeup, limit=3)
    reflector.start()
    eventually(lambda: len(reflector.collection().items) == 7 and reflector.collection().current)
    times = []

    def has(name: str) -> bool:
        return name in reflector.collection().items

    for n in range(7, 27):
        began = time.monotonic()
        api.create(path, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"n{n}"}})
        eventually(partial(has, f"n{n}"), every=0.001)
        times.append(time.monotonic() - began)
    uid = reflector.collection().items["n3"]
    with pytest.raises(client.Conflict):
        api.delete(f"{path}/n3", uid="another")
    api.delete(f"{path}/n3", uid=uid)
    eventually(lambda: "n3" not in reflector.collection().items)
    with pytest.raises(client.NotFound):
        api.get(f"{path}/n3")
    with pytest.raises(client.AlreadyExists):
        api.create(path, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n4"}})
    with pytest.raises(client.Conflict):
        api.patch(f"{path}/n4", {"metadata": {"resourceVersion": "1", "labels": {"a": "b"}}})
    reflector.close()
    wakeup.close()
    print(f"create → seen: median {sorted(times)[10] * 1000:.1f} ms, worst {max(times) * 1000:.1f} ms")
    assert sorted(times)[10] < 2.0


@pytest.mark.kube
def test_a_real_server_that_goes_comes_back_or_stalls(cluster: ControlPlane, real: Api) -> None:
    api, wakeup = real, Wakeup()
    path = "/api/v1/nodes"
    api.create(path, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "before"}})
    reflector: Reflector[str] = Reflector(api, path, lambda f: f["metadata"]["uid"], wakeup, silence=3.0, seconds=30)
    reflector.start()
    eventually(lambda: "before" in reflector.collection().items and reflector.collection().current)
    add = iter(range(100))

    def follows() -> bool:
        name = f"after{next(add)}"
        api.create(path, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
        eventually(lambda: name in reflector.collection().items)
        return True

    cluster.kill(APISERVER)
    eventually(lambda: reflector.collection().problem)
    time.sleep(2.0)
    assert "before" in reflector.collection().items
    cluster.start(APISERVER)
    assert follows()
    cluster.restart(ETCD)
    eventually(follows)
    cluster.pause(APISERVER)
    try:
        eventually(lambda: reflector.collection().problem)
    finally:
        cluster.resume(APISERVER)
    eventually(lambda: not reflector.collection().problem)
    assert follows()
    reflector.close()
    wakeup.close()
