"""`ovsmesh check` and `status` tell what packets do: each fault is named with its peer and its likely cause."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from ovsmesh.lab.faults import fault, tunnel
from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.support.labtools import SOON, Make, at_rest, drift, live, metrics, turns

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def three(module_lab: Make) -> Lab:
    made = module_lab(3, 1, dual_stack=True)
    at_rest(made)
    return made


def check(host: Host, *options: str) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the exit status, the report, and its peers by name."""
    done = host.ovsmesh("check", "-o", "json", *options, timeout=120)
    assert done.returncode in (0, 2), done.stdout + done.stderr
    report = json.loads(done.stdout)
    return done.returncode, report, {peer["name"]: peer for peer in report["peers"]}


def test_all_is_well_and_each_family_has_answered(three: Lab) -> None:
    code, report, peers = check(three.host(1))
    assert (code, {name: peer["state"] for name, peer in peers.items()}) == (0, {"h2": "ok", "h3": "ok"})
    assert all(peer["reach"]["roundTrip"] > 0 and peer["reach"]["loss"] == 0 for peer in peers.values())
    assert "all 2 peers ok" in report["headline"]


def test_a_cut_names_the_peer_and_the_blocked_protocol(three: Lab) -> None:
    one, _, third = three.hosts
    with fault(three, f"{tunnel(one, third)} drop", f"{tunnel(third, one)} drop"):
        code, report, peers = check(one)
        assert (code, peers["h2"]["state"], peers["h3"]["state"]) == (2, "ok", "unreachable")
        since = r"h1: 1 of 2 peers not reachable: h3 \(since \d\d:\d\d:\d\dZ, nothing arrives from it\)"
        assert re.fullmatch(since, report["headline"])
        (why,) = peers["h3"]["missing"]
        assert all(word in why for word in ("nothing arrives", "GRE", str(one.address), str(third.address)))
        degraded = next(c for c in report["conditions"] if c["type"] == "Degraded")
        assert (degraded["status"], degraded["reason"]) == ("True", "PeersUnreachable")
    assert check(one)[0] == 0


def test_one_direction_is_told_from_both(three: Lab) -> None:
    one, _, third = three.hosts
    # nothing else sends probes yet, so the other end's own check is what is heard
    with fault(three, f"{tunnel(one, third)} drop"):
        code, _, peers = check(third, "--peer", "h1")
        assert (code, list(peers)) == (2, ["h1"])
        assert "nothing arrives" in peers["h1"]["missing"][0]


@pytest.mark.parametrize("limit", [1400, 1300])
def test_a_path_that_carries_only_small_packets_is_measured_to_the_byte(three: Lab, limit: int) -> None:
    one, second, _ = three.hosts
    # an outer packet of `limit` bytes carries 38 bytes less
    with fault(three, f"{tunnel(one, second)} ip length > {limit} drop"):
        code, report, peers = check(one)
        assert (code, peers["h2"]["state"], peers["h3"]["state"]) == (2, "small packets only", "ok")
        assert peers["h2"]["reach"]["pathMtu"] == limit - 38
        assert str(limit - 38) in peers["h2"]["missing"][0]
        assert "h2" in report["headline"]


def test_a_peer_that_is_down_is_named_and_its_agent_is_not_needed(three: Lab) -> None:
    third = three.host(3)
    third.stop_agent()
    try:
        assert check(three.host(1))[0] == 0
        with fault(three, f"ip saddr {third.address} drop", f"ip daddr {third.address} drop"):
            assert check(three.host(1))[2]["h3"]["state"] == "unreachable"
    finally:
        third.start_agent()


def test_what_can_not_be_told_is_exit_1(three: Lab) -> None:
    done = three.host(1).ovsmesh("check", "--peer", "h9")
    assert done.returncode == 1 and "h9" in done.stderr and "h2" in done.stderr


def states(host: Host) -> dict[str, str]:
    """Return the states of the peers as the running agent shows them."""
    return {peer["name"]: peer["state"] for peer in live(host)["peers"]}


def cause(host: Host, peer: str) -> str:
    """Return what the running agent says of a peer to which packets are lost."""
    return str(next(found for found in live(host)["peers"] if found["name"] == peer)["missing"][0])


def all_ok(lab: Lab) -> None:
    wait_for("all peers to be ok", lambda: all(set(states(h).values()) == {"ok"} for h in lab.hosts), SOON)


def test_status_metrics_and_conditions_tell_of_a_cut_and_of_its_end(three: Lab) -> None:
    all_ok(three)
    one, _, third = three.hosts
    assert one.ovsmesh("status").returncode == 0
    with fault(three, f"{tunnel(one, third)} drop", f"{tunnel(third, one)} drop"):
        wait_for("h3 to be unreachable", lambda: states(one) == {"h2": "ok", "h3": "unreachable"}, SOON)
        done = one.ovsmesh("status")
        assert done.returncode == 2
        assert done.stdout.startswith("h1: 1 of 2 peers not reachable: h3 (since "), done.stdout
        assert "! h3: nothing arrives from it" in done.stdout, done.stdout
        assert metrics(one)['ovsmesh_peers{state="unreachable"}'] == 1
        assert metrics(one)['ovsmesh_peers{state="ok"}'] == 1
        reasons = {c["type"]: c["reason"] for c in live(one)["conditions"]}
        assert (reasons["Converged"], reasons["Degraded"]) == ("AsWanted", "PeersUnreachable")
        wait_for("the other end to say so too", lambda: states(third)["h1"] == "unreachable", SOON)
    all_ok(three)
    log = one.agent_log.read_text()
    assert "h3 unreachable: " in log and log.rindex("h3 is reachable again") > log.rindex("h3 unreachable: ")
    assert one.ovsmesh("status").returncode == 0


def test_metrics_name_the_peer_and_count_what_the_tunnels_carry(three: Lab) -> None:
    all_ok(three)
    one, _, third = three.hosts
    carried = [f'ovsmesh_tunnel_bytes_total{{direction="{way}"}}' for way in ("receive", "transmit")]
    wait_for("the ports' counters", lambda: all(metrics(one).get(name, 0) > 0 for name in carried), SOON)
    well = metrics(one)
    assert sum(number for name, number in well.items() if name.startswith("ovsmesh_peers{")) == 2
    assert well["ovsmesh_peers_wanted"] == 2 and well['ovsmesh_peer_unreachable{peer="h3"}'] == 0
    assert well['ovsmesh_peer_path_mtu_bytes{peer="h3"}'] == live(one)["self"]["mtu"]
    assert 0 < well["ovsmesh_probe_round_trip_seconds_count"] <= well["ovsmesh_probes_sent_total"]
    digests = [{name for name in metrics(host) if name.startswith("ovsmesh_mesh_info")} for host in three.hosts]
    assert len(digests[0]) == 1 and digests[1:] == digests[:-1]
    with fault(three, f"{tunnel(one, third)} drop", f"{tunnel(third, one)} drop"):
        wait_for("h3 to be named", lambda: metrics(one)['ovsmesh_peer_unreachable{peer="h3"}'] == 1, SOON)
        cut = metrics(one)
        assert cut['ovsmesh_peer_unreachable{peer="h2"}'] == 0
        assert 'ovsmesh_peer_path_mtu_bytes{peer="h3"}' not in cut
        assert cut["ovsmesh_probes_lost_total"] > well["ovsmesh_probes_lost_total"]
    all_ok(three)


def test_one_direction_is_named_by_the_end_that_hears_the_other(three: Lab) -> None:
    all_ok(three)
    one, _, third = three.hosts
    with fault(three, f"{tunnel(one, third)} drop"):
        wait_for("both to say so", lambda: states(one)["h3"] == states(third)["h1"] == "unreachable", SOON)
        # h3's next probe tells
        wait_for("h1 to hear h3", lambda: "its packets arrive here" in cause(one, "h3"), SOON)
        assert f"from {one.address} to {third.address}" in cause(one, "h3")
        assert "nothing arrives from it" in cause(third, "h1")
    all_ok(three)


def test_probes_are_no_drift_and_wake_no_reconcile(three: Lab) -> None:
    all_ok(three)
    host = three.host(1)
    before, sent = turns(host), next(peer["reach"]["sent"] for peer in live(host)["peers"])
    wait_for("ten more probes", lambda: next(p["reach"]["sent"] for p in live(host)["peers"]) > sent + 10, SOON)
    assert not any(drift(host).values())
    # the routine look at the whole system may fall into this time
    assert turns(host) <= before + 1
