"""What the controller costs at 1,000 Nodes: memory, slice writes, time from a Node to its slice."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ovsmesh.kube.reflector import Reflector
from ovsmesh.wakeup import Wakeup
from tests.support.controllerkit import NODES, STRATEGIC, Cluster, Object, mesh, numbered
from tests.support.kubekit import GROUP, eventually

pytestmark = pytest.mark.kube

NUMBER = 1000


def big(number: int) -> Object:
    """A Node of about 6 KB, as kubelets make them: images are most of it."""
    found = numbered(number)
    images = [{"names": [f"registry.example/{n:02d}/{'x' * 60}@sha256:{n:064d}"], "sizeBytes": n} for n in range(32)]
    found["status"]["images"] = images
    return found


def fill(kube: Cluster, numbers: range, threads: int = 4) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(kube.add, map(big, numbers)))


def test_a_thousand_nodes(kube: Cluster, record_property: pytest.RecordProperty) -> None:  # type: ignore[name-defined]
    kube.add(mesh("10.0.0.0/8"))
    fill(kube, range(NUMBER))
    controller = kube.controller()
    began = time.monotonic()
    eventually(lambda: len(kube.members()) == NUMBER)
    figures = {"all in slices after start, s": time.monotonic() - began, "slice writes": kube.slice_writes()}
    assert kube.slice_writes() == 10
    # The Nodes' conditions are written beside.
    eventually(lambda: controller.metric("ovsmesh_controller_node_writes_total") >= NUMBER)
    figures["all Nodes' conditions, s"] = time.monotonic() - began

    # One by one (closer together they wait for each other, 0.1 s at most): from the request that makes a Node
    # to its entry in a watch of the slices.
    seen: dict[str, float] = {}
    wakeup = Wakeup()

    def note(found: Object) -> int:
        for entry in found["spec"]["nodes"]:
            seen.setdefault(entry["name"], time.monotonic())
        return 0

    watch = Reflector(kube.api, f"{GROUP}/meshslices", note, wakeup)
    watch.start()
    eventually(lambda: watch.collection().synced)
    times = []
    for number in range(NUMBER, NUMBER + 50):
        found = big(number)
        sent = time.monotonic()
        kube.add(found)
        eventually(lambda found=found: found["metadata"]["name"] in seen, 5, 0.002)  # type: ignore[misc]
        times.append(1000 * (seen[found["metadata"]["name"]] - sent))
        time.sleep(0.15)
    times.sort()
    figures |= {"join p50, ms": statistics.median(times), "join p99, ms": times[-1]}

    # 500 at once.
    time.sleep(2)
    writes = kube.slice_writes()
    began = time.monotonic()
    coming = threading.Thread(target=fill, args=(kube, range(NUMBER + 50, NUMBER + 550), 2))
    coming.start()
    coming.join(60)
    figures["500 Nodes made in, s"] = time.monotonic() - began
    eventually(lambda: len(seen) == NUMBER + 550, every=0.01)
    figures["500 Nodes in slices, s"] = max(seen.values()) - began
    figures["500 Nodes, slice writes"] = kube.slice_writes() - writes
    watch.close()
    wakeup.close()

    # Heartbeats.
    time.sleep(8)
    writes = kube.slice_writes()
    busy = controller.metric("process_cpu_seconds_total")
    for number in range(300):
        beat = {"type": "Ready", "status": "True", "lastHeartbeatTime": "2026-01-01T00:00:00Z"}
        name = numbered(number)["metadata"]["name"]
        kube.api.patch(f"{NODES}/{name}/status", {"status": {"conditions": [beat]}}, STRATEGIC)
    time.sleep(0.5)
    figures["CPU a heartbeat, ms"] = 1000 * (controller.metric("process_cpu_seconds_total") - busy) / 300
    figures["slice writes in 300 heartbeats"] = kube.slice_writes() - writes
    figures["memory, MiB"] = controller.memory()
    for name, value in figures.items():
        print(f"{name}: {value:.1f}")
        record_property(name, value)
    assert figures["slice writes in 300 heartbeats"] == 0
    # On a machine that takes longer than the 5 s that this is meant for, it is more of them.
    assert figures["500 Nodes, slice writes"] < 60 * max(1.0, figures["500 Nodes made in, s"] / 5)
    assert figures["memory, MiB"] <= 120
    assert kube.whole() and len(kube.members()) == NUMBER + 550
