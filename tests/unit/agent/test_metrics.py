"""The agent's metrics: each peer is counted once, series do not grow with the mesh, counters only grow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry

from ovsmesh.agent.metrics import METRICS, WORST, Scrape, TunnelTotals
from ovsmesh.agent.result import AgentCounters, NodeStatus, ReconcileResult
from ovsmesh.dataplane.plan import Plan, Step
from ovsmesh.dataplane.report import Peer, Report, Self, Traffic
from ovsmesh.dataplane.types import Reach, State
from ovsmesh.mesh.types import Mesh
from ovsmesh.metrics import MetricsCollector
from ovsmesh.probe.sender import Totals


def peer(name: str, state: str = "ok", **found: Any) -> Peer:
    known = {str(each): each for each in State}
    reach = Reach(known[state], **found) if state in known else Reach()
    return Peer(name, state, port=f"gre-{name}", reach=None if state in ("held", "refused") else reach)


class Made(NodeStatus):
    """A status with a report of the test's own."""

    def __init__(self, *peers: Peer, digest: str = "7c1f00d0beef", totals: Totals = Totals(), **result: Any) -> None:  # noqa: B008
        super().__init__(ReconcileResult(**result), AgentCounters(), probes=lambda: totals)
        me = Self("web1", mtu=1462, mesh_digest=digest)
        self._report = Report(1.8e9, "web1", True, me, (), peers, (), (), ())


def scraped(status: NodeStatus, tunnels: Traffic = Traffic()) -> dict[str, float]:  # noqa: B008
    """Series as they stand in /metrics → value."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(MetricsCollector(METRICS, lambda: Scrape(status, tunnels)))
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def of(found: dict[str, float], name: str) -> dict[str, float]:
    """The values of one metric by its label's value."""
    return {key.split('"')[1]: value for key, value in found.items() if key.startswith(f"{name}{{")}


def test_each_peer_is_counted_once() -> None:
    states = [*map(str, State), "missing", "held", "refused", "unknown"]
    found = scraped(Made(*(peer(f"web{at}", state) for at, state in enumerate(states))))
    assert of(found, "ovsmesh_peers") == dict.fromkeys(states, 1)
    assert found["ovsmesh_peers_wanted"] == len(states) - 2


def test_the_worst_peers_have_series_and_no_more_of_them() -> None:
    peers = [peer(f"web{n:03}", loss=0.0, round_trip=0.001) for n in range(500)]
    peers[300] = peer("web300", "unreachable", loss=1.0)
    peers[400] = peer("web400", "small packets only", path_mtu=1400, loss=0.1, round_trip=0.002)
    peers[450] = peer("web450", "not probed yet")
    found = scraped(Made(*peers))
    unreachable = of(found, "ovsmesh_peer_unreachable")
    assert unreachable["web300"] == 1 and unreachable["web400"] == 0 and "web450" not in unreachable
    assert len(unreachable) == WORST - 1, "what was not probed yet is neither"
    mtu = of(found, "ovsmesh_peer_path_mtu_bytes")
    assert mtu["web400"] == 1400 and mtu["web000"] == 1462 and "web300" not in mtu
    assert of(found, "ovsmesh_peer_loss_ratio")["web300"] == 1
    assert of(found, "ovsmesh_peer_round_trip_seconds")["web400"] == 0.002


def test_series_do_not_grow_with_the_mesh() -> None:
    few = scraped(Made(*(peer(f"web{n}", loss=0.0, round_trip=1.0) for n in range(WORST))))
    many = scraped(Made(*(peer(f"web{n}", loss=0.0, round_trip=1.0) for n in range(2000))))
    assert len(few) == len(many)


def test_equally_bad_peers_do_not_take_turns() -> None:
    first = scraped(Made(*(peer(f"web{n:02}", loss=0.01 * (n % 7), round_trip=n / 1e4) for n in range(60))))
    later = scraped(Made(*(peer(f"web{n:02}", loss=0.01 * (n % 5), round_trip=(60 - n) / 1e4) for n in range(60))))
    assert first.keys() == later.keys()


def test_probes_are_counted_and_their_round_trips_too() -> None:
    totals = Totals(10, 2, Totals().round_trips.plus(0.0003).plus(0.3))
    found = scraped(Made(totals=totals))
    assert found["ovsmesh_probes_sent_total"] == 10 and found["ovsmesh_probes_lost_total"] == 2
    assert found["ovsmesh_probe_round_trip_seconds_count"] == 2
    assert found['ovsmesh_probe_round_trip_seconds_bucket{le="0.0005"}'] == 1


def test_the_mesh_and_what_is_held() -> None:
    held = Plan(held=(Step("-", "fdb", "x", None, "y"),), held_peers=("web3", "web4"))
    found = scraped(Made(plan=held, mesh=Mesh(()), mesh_current=True))
    assert found["ovsmesh_held_removals"] == 2 and found['ovsmesh_mesh_info{digest="7c1f00d0beef"}'] == 1
    assert found["ovsmesh_mesh_current"] == 1
    assert scraped(Made(mesh=Mesh(())))["ovsmesh_mesh_current"] == 0
    nothing = scraped(Made(digest=""))
    assert not [key for key in nothing if key.startswith("ovsmesh_mesh_") and "refused" not in key]


def test_what_ports_count_is_summed_and_never_shrinks() -> None:
    totals = TunnelTotals()

    def counted(**ports: Traffic | None) -> Traffic:
        peers = tuple(replace(peer(name), traffic=traffic) for name, traffic in ports.items())
        return totals.add(Made(*peers).report)

    assert counted(web2=None) == Traffic()
    assert counted(web2=Traffic(1, 2, 100, 200, 0), web3=Traffic(1, 1, 10, 10, 5)) == Traffic(2, 3, 110, 210, 5)
    assert counted(web2=Traffic(2, 2, 150, 200, 1)) == Traffic(3, 3, 160, 210, 6), "web3 is gone"
    assert counted() == Traffic(3, 3, 160, 210, 6), "nothing can be read"
    assert counted(web2=Traffic(2, 2, 151, 200, 1)) == Traffic(3, 3, 161, 210, 6)
    assert counted(web2=Traffic(1, 1, 7, 7, 0)) == Traffic(4, 4, 168, 217, 6), "the port was made again"
    assert counted(web2=Traffic(1, None, 8, None, None)) == Traffic(4, 4, 169, 217, 6)


def test_tunnels_are_exported_once_something_is_known() -> None:
    found = scraped(Made(), Traffic(3, 4, 30, 40, None))
    assert of(found, "ovsmesh_tunnel_bytes_total") == {"receive": 30, "transmit": 40}
    assert of(found, "ovsmesh_tunnel_packets_total") == {"receive": 3, "transmit": 4}
    assert not [key for key in found if "tunnel_errors" in key], "unknown is not 0"
    assert not [key for key in scraped(Made()) if "tunnel" in key]
    assert scraped(Made(), Traffic(errors=2))["ovsmesh_tunnel_errors_total"] == 2
