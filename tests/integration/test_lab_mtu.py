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
