"""What tests of the mesh from MeshSlices share: slices on a stub, sources of them, a status to publish."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from ovsmesh.agent.result import AgentCounters, NodeStatus, ReconcileResult
from ovsmesh.dataplane.desired import dataplane
from ovsmesh.dataplane.plan import Plan
from ovsmesh.dataplane.types import Dataplane, Facts, Observed, Reach
from ovsmesh.kube.client import Api, Object
from ovsmesh.kube.config import load
from ovsmesh.mesh.slice_source import SliceSource
from ovsmesh.mesh.source import Snapshot
from ovsmesh.mesh.types import Mesh, Node
from ovsmesh.names import MESH_SLICES
from ovsmesh.ovs.figures import SwitchFigures
from ovsmesh.state_dir import StateDir
from tests.support.kubestub import Stub

CLUSTER = "10.0.0.0/8"
SETTINGS = {"clusterCIDRs": [CLUSTER], "encapsulation": "gre", "mtu": "auto"}
LABELS = {"ovsmesh.io/mesh": "default"}


def node(number: int, **change: Any) -> Object:
    high, low = divmod(number, 250)
    entry = {"name": f"n{number}", "uid": f"u{number}", "address": f"192.0.{high}.{low + 1}"}
    return {**entry, "podCIDRs": [f"10.{high}.{low}.0/24"], **change}


def spec(index: int, count: int, *nodes: Object, generation: int = 1, **settings: Any) -> Object:
    about = {"mesh": "default", "index": index, "count": count, "meshGeneration": generation}
    return {**about, "settings": {**SETTINGS, **settings}, "nodes": list(nodes)}


def put(stub: Stub, index: int, count: int, *nodes: Object, **more: Any) -> None:
    stub.put(f"{MESH_SLICES}/default-{index:03d}", spec(index, count, *nodes, **more), labels=LABELS)


def make_stub(tmp_path: Path) -> Iterator[Stub]:
    made = Stub(tmp_path)
    yield made
    made.close()


def make_state(tmp_path: Path) -> Path:
    StateDir(tmp_path / "state").ensure()
    return tmp_path / "state"


Open = Callable[..., SliceSource]


def make_open_source(stub: Stub, state: Path) -> Iterator[Open]:
    made: list[SliceSource] = []
    apis: list[Api] = []

    def make(self_name: str = "n0", **options: Any) -> SliceSource:
        apis.append(Api(load(stub.kubeconfig()), timeout=2.0))
        made.append(SliceSource(apis[-1], state, self_name, **{"silence": 2.0, "seconds": 30, **options}))
        return made[-1]

    yield make
    for source in made:
        source.close()
    for api in apis:
        api.close()


def members(snapshot: Snapshot) -> str:
    return " ".join(n.name for n in snapshot.mesh.nodes) if snapshot.mesh else "-"


def reasons(snapshot: Snapshot) -> list[str]:
    return [problem.reason for problem in snapshot.problems]


def becomes(source: SliceSource, names: str, confirmed: bool = True, within: float = 20.0) -> Snapshot:
    """Wait for the source to wake, as the loop does, until the snapshot is this."""
    end = time.monotonic() + within
    while True:
        found = source.snapshot()
        if members(found) == names and found.confirmed is confirmed:
            return found
        left = end - time.monotonic()
        assert left > 0, (members(found), found.confirmed, [str(p) for p in found.problems])
        select.select(source.fds(), [], [], left)
        source.drain()


def published(
    converged: bool = True, *, uid: str = "u0", ovs: str = "3.1.0", reach: Mapping[str, Reach] | None = None
) -> NodeStatus:
    """Return what the agent of n0 publishes, which has one peer, or those in `reach` and is wired to them."""
    node0 = Node("n0", ip_address("192.0.2.1"), (ip_network("10.0.0.0/24"),), uid)
    peers = [
        Node(name, ip_address(f"192.0.{number >> 8}.{number & 255}"), (ip_network((167772160 + number * 256, 24)),))
        for number, name in enumerate(reach or ("z",), 700)
    ]
    mesh, facts = Mesh((ip_network(CLUSTER),), (node0, *peers)), Facts(1500)
    have = dataplane(mesh, "n0", facts)[0] if reach else Dataplane()
    result = ReconcileResult(mesh, facts, None, Observed(have), Plan(), (), converged, True)
    states = {name: found.state for name, found in (reach or {}).items()}
    probed = None if reach is None else lambda: reach
    return NodeStatus(result, AgentCounters(), "n0", "", probed, states, lambda: SwitchFigures(ovs))
