"""Heartbeats: a thousand Nodes whose status is patched every ten seconds, and what an agent receives of them.

Bytes are the kernel's count for the agent's own TCP connections (ss), with TLS and HTTP. A second watch of the slices
shows the size of one bookmark, a watch of the Nodes what an agent without slices would receive.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from benchlib.figures import Figure
from benchlib.kube_testbed import NODES, SLICES, STRATEGIC, KubeTestbed, kube_testbed
from benchlib.peers import peer
from benchlib.testbed import Plan, cpu_seconds, mib
from ovsmesh.errors import OvsmeshError
from ovsmesh.kube.client import Api
from ovsmesh.kube.config import load
from ovsmesh.kube.http import Stream
from ovsmesh.lab import netns
from ovsmesh.lab.netns import LabError

_NODES = 1000
_EVERY = 10.0
_PATCHERS = 3
_RECEIVED = re.compile(r"bytes_received:(\d+)")


class _Watch:
    """A watch in a thread. Counts bytes and events, and bookmarks apart from them."""

    def __init__(self, s: KubeTestbed, path: str, config: str) -> None:
        self._api = Api(load(config))
        self.bytes = self.bookmark_bytes = self.bookmarks = self.events = 0
        self._stream: Stream | None = None
        self._path = path
        self._thread = threading.Thread(target=self._run, daemon=True)
        netns.within(s.plane.ns, self._thread.start)
        netns.wait_for(f"a watch of {path}", lambda: self._stream, 30)

    def _run(self) -> None:
        version = ""
        for page in self._api.pages(self._path):
            version = page.version
        self._stream = self._api.watch(self._path, version, 600, 120)
        before = 0
        with contextlib.suppress(OvsmeshError):
            for kind, _ in self._stream:
                size, before = self._stream.received - before, self._stream.received
                self.bytes += size
                if kind == "BOOKMARK":
                    self.bookmarks += 1
                    self.bookmark_bytes = size
                else:
                    self.events += 1
        self._stream.release()

    def close(self) -> None:
        if self._stream:
            self._stream.close()
        self._thread.join(5)
        self._api.close()


@contextlib.contextmanager
def _watch(s: KubeTestbed, path: str, config: str) -> Iterator[_Watch]:
    made = _Watch(s, path, config)
    try:
        yield made
    finally:
        made.close()


def _received(s: KubeTestbed) -> int:
    """Return the bytes that the agent received on its connections to the API server since they were opened."""
    text = s.host.run(["ss", "-tinpH", "dst", f"{s.plane.address}:{s.plane.port}"]).stdout
    mine = [block for block in re.split(r"\n(?=\S)", text) if f"pid={s.pid()}," in block]
    total = sum(int(found) for block in mine for found in _RECEIVED.findall(block))
    if not total:
        raise LabError(f"ss shows no connection of the agent to the API server: {text[:500]}")
    return total


def _beat(s: KubeTestbed, number: int) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    status = {"conditions": [{"type": "Ready", "lastHeartbeatTime": now}]}
    s.admin.ask("PATCH", f"{NODES}/{peer(number).name}/status", {"status": status}, STRATEGIC)


def _beats(s: KubeTestbed, seconds: float) -> tuple[int, float]:
    """Send every Node's heartbeat each ten seconds. Return how many there were, and their seconds."""
    started = time.monotonic()
    count = int(seconds / _EVERY * _NODES)

    def one(number: int) -> None:
        time.sleep(max(0.0, started + number * _EVERY / _NODES - time.monotonic()))
        _beat(s, number % _NODES)

    with ThreadPoolExecutor(_PATCHERS) as pool:
        list(pool.map(one, range(count)))
    return count, time.monotonic() - started


def bench(plan: Plan) -> list[Figure]:
    """Measure what heartbeats cost."""
    seconds = plan.tries(60, 20)
    with kube_testbed([peer(n) for n in range(_NODES)]) as s:
        config = s.cluster.agent_config(s.host)
        s.cluster.start_agent(s.host)
        s.ready()
        # the conditions of all Nodes are written once, and the agent writes its MeshNode
        time.sleep(plan.tries(20, 10))
        with _watch(s, SLICES, str(config)) as slices, _watch(s, NODES, str(s.plane.kubeconfig())) as nodes:
            time.sleep(1)
            writes, before = s.admin.slice_writes(), _received(s)
            sent, seen, reconciles = nodes.bytes, nodes.events, _reconciles(s)
            agent, server, controller = s.pid(), s.plane.pid("kube-apiserver"), s.pid("controller1")
            used = {pid: cpu_seconds(pid) for pid in (agent, server, controller)}
            count, took = _beats(s, seconds)
            spent = {pid: (cpu_seconds(pid) - before_) / took * 100 for pid, before_ in used.items()}
            time.sleep(0.5)
            got = _received(s) - before
            sent, seen, reconciles = nodes.bytes - sent, nodes.events - seen, _reconciles(s) - reconciles
            written = s.admin.slice_writes() - writes
            if not slices.bookmarks:
                # bookmarks come once a minute: the next one shows their size
                netns.wait_for("a bookmark", lambda: slices.bookmarks, 90)
            frame = slices.bookmark_bytes + _framing(slices.bookmark_bytes)
        plan.progress(f"  {count} heartbeats in {took:.0f} s: agent received {got} bytes; a watch of Nodes {sent}")
        rate = f"{count} heartbeats in {took:.1f} s; one bookmark takes {frame} bytes: these are {got / frame:.2f}"
        memory = f"controller {mib(controller):.0f} MiB"
        least = max(got, frame)
        return [
            Figure("kube-heartbeats", "bytes that the agent received", "", (float(got),), note=rate),
            Figure("kube-heartbeats", "  of them other than bookmarks", "", (float(got % frame),), bound=0.0),
            Figure("kube-heartbeats", "  events that a watch of slices had", "", (float(slices.events),), bound=0.0),
            Figure("kube-heartbeats", "slice writes", "", (float(written),), bound=0.0),
            Figure("kube-heartbeats", "reconciles of the agent", "", (float(reconciles),)),
            Figure(
                "kube-heartbeats",
                "bytes by slices (at least one bookmark)",
                "",
                (float(least),),
                "by Nodes",
                (float(sent),),
                note=f"{seen} events of {sent / max(1, seen):,.0f} bytes each: {sent / least:,.0f} times as much",
            ),
            Figure("kube-heartbeats", "CPU of the agent", "%", (spent[agent],)),
            Figure("kube-heartbeats", "CPU of the controller", "%", (spent[controller],), note=memory),
            Figure("kube-heartbeats", "CPU of the API server", "%", (spent[server],)),
        ]


def _framing(size: int) -> int:
    """Return the bytes that an HTTP chunk and a TLS 1.3 record add to `size` bytes."""
    return len(f"{size:x}") + 4 + 22


def _reconciles(s: KubeTestbed) -> int:
    _, text = s.host.http("/metrics")
    found = re.search(r"^ovsmesh_reconcile_total (\S+)", text, re.MULTILINE)
    return int(float(found[1])) if found else -1
