"""The MTU of pods on hosts whose underlay is no plain 1500: jumbo frames, an address that is away, one on lo too."""

from __future__ import annotations

import pytest

from ovsmesh.lab.host import Host
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.support.labtools import SOON, Make, at_rest, ip_json, live

pytestmark = pytest.mark.lab

JUMBO = 9000 - 38


@pytest.fixture(scope="module")
def jumbo(module_lab: Make) -> Lab:
    made = module_lab(2, 1, dual_stack=True, underlay_mtu=9000)
    at_rest(made)
    return made


def mtu(host: Host, link: str = "kbr0") -> int:
    return int(ip_json(host, "link", "show", link)[0]["mtu"])


def says_missing(host: Host) -> bool:
    return any(problem["reason"] == "TunnelAddressMissing" for problem in live(host).get("problems", ()))


def test_the_mtu_stays_while_the_tunnel_address_is_away(jumbo: Lab) -> None:
    """A lease that is renewed, a network service that is restarted; and the agent too, meanwhile."""
    one = jumbo.host(1)
    assert mtu(one) == JUMBO
    before = one.agent_log.read_text()
    one.run(["ip", "addr", "flush", "dev", "br-phy", "scope", "global"])
    try:
        wait_for("the agent to miss the address", lambda: says_missing(one), SOON)
        assert mtu(one) == JUMBO == mtu(one, "obr0")
        one.stop_agent()
        one.start_agent()
        wait_for("the new agent to miss it", lambda: says_missing(one), SOON)
        assert mtu(one) == JUMBO
        assert f"kept: {one.address} is on no link" in live(one)["self"]["mtuFrom"]
    finally:
        one.address_underlay()
    at_rest(jumbo)
    assert mtu(one) == JUMBO
    assert " mtu " not in one.agent_log.read_text().removeprefix(before)


def test_the_tunnel_address_on_lo_too_changes_nothing(jumbo: Lab) -> None:
    one = jumbo.host(1)
    one.run(["ip", "addr", "add", f"{one.address}/32", "dev", "lo"])
    try:
        # another process reads everything again, as the agent does once a minute
        assert one.ovsmesh("plan").returncode == 0
        one.stop_agent()
        one.start_agent()
        at_rest(jumbo)
        assert mtu(one) == JUMBO
    finally:
        one.run(["ip", "addr", "del", f"{one.address}/32", "dev", "lo"])


def pings(lab: Lab, source: int, target: int, size: int, *options: str) -> bool:
    """Whether one of a few packets of this size passes from a pod to a pod and back, in each IP family."""
    pod, wanted = lab.host(source).pods[0], lab.host(target).pods[0].addresses
    done = [
        pod.run(["ping", "-c4", "-i0.3", "-W2", *options, "-s", str(size - (28 if a.version == 4 else 48)), str(a)],
                check=False)
        for a in wanted
    ]  # fmt: skip
    return all(" bytes from " in one.stdout for one in done)


def route_mtus(host: Host, peer: Host) -> set[int]:
    found = [ip_json(host, f"-{c.version}", "route", "show", str(c))[0] for c in peer.pod_cidrs]
    return {route["metrics"][0]["mtu"] for route in found}


def seen(host: Host) -> tuple[str, int]:
    """The state of its peer, and the path MTU to it."""
    (peer,) = live(host).get("peers") or [{}]
    return peer.get("state", ""), peer.get("reach", {}).get("pathMtu", 0)


def underlay(host: Host, mtu: int) -> None:
    host.run(["ip", "link", "set", "eth0", "mtu", str(mtu)])
    host.ovs_vsctl("set", "interface", "br-phy", f"mtu_request={mtu}")


def test_hosts_with_9000_and_1500_lose_no_packet_in_silence(jumbo: Lab) -> None:
    """Both routes carry what both ends can, and senders of larger packets are told; and larger again, after that."""
    one, second = jumbo.hosts
    assert pings(jumbo, 1, 2, JUMBO, "-Mdo")
    underlay(second, 1500)
    try:
        wait_for("the smaller MTU at the second", lambda: mtu(second) == 1462, SOON)
        second.plug()
        wait_for("the route to it to be as small", lambda: route_mtus(one, second) == {1462}, SOON)
        assert mtu(one) == JUMBO and route_mtus(second, one) == {1462}
        for source, target in ((1, 2), (2, 1)):
            assert pings(jumbo, source, target, 4000, "-Mdont"), (source, target)
            assert pings(jumbo, source, target, 1462, "-Mdo")
        # a sender that forbids fragments is told by its node
        told = one.pods[0].run(
            ["ping", "-c3", "-i0.3", "-W2", "-Mdo", "-s3972", str(second.pods[0].addresses[0])], check=False
        )
        assert "mtu" in told.stdout + told.stderr, told
        # what is in place says it all: nobody else would change it, nor another agent
        assert one.ovsmesh("plan").returncode == 0
        one.stop_agent()
        one.start_agent()
        wait_for("the new agent to know", lambda: seen(one) == ("ok", 1462), SOON)
        assert route_mtus(one, second) == {1462}
    finally:
        underlay(second, 9000)
    wait_for("the second to have grown", lambda: mtu(second) == JUMBO, SOON)
    second.plug()
    wait_for("both routes to carry all", lambda: route_mtus(one, second) | route_mtus(second, one) == {JUMBO}, SOON)
    for version in ("-4", "-6"):
        # for ten minutes a pod's kernel remembers what it was told
        one.pods[0].run(["ip", version, "route", "flush", "cache"])
    assert pings(jumbo, 1, 2, JUMBO, "-Mdo")
    at_rest(jumbo)
