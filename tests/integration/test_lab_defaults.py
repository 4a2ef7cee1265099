"""kbr0 works on a host whose settings for new links would keep it from forwarding or from answering."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ovsmesh.lab import netns
from ovsmesh.lab.lab import Lab
from ovsmesh.lab.netns import wait_for
from tests.support.labtools import SOON, Make, at_rest, sysctls

pytestmark = pytest.mark.lab

DEFAULTS = {
    "net/ipv4/conf/default/forwarding": "0",
    "net/ipv4/conf/default/rp_filter": "1",
    "net/ipv4/conf/default/arp_ignore": "8",
    "net/ipv4/conf/default/arp_filter": "1",
    "net/ipv4/conf/default/proxy_arp": "1",
    "net/ipv4/conf/default/send_redirects": "1",
    "net/ipv6/conf/default/forwarding": "0",
    "net/ipv6/conf/default/disable_ipv6": "1",
    "net/ipv6/conf/default/accept_ra": "2",
    "net/ipv6/conf/default/addr_gen_mode": "1",
}


@pytest.fixture(scope="module")
def two(module_lab: Make) -> Iterator[Lab]:
    """Two hosts; on the first, kbr0 was made after the defaults for new links were set."""
    made = module_lab(2, 2, dual_stack=True)
    at_rest(made)
    one = made.host(1)
    before = sysctls(one, "net/ipv4/conf/default", "net/ipv6/conf/default")
    netns.sysctl(one.ns, DEFAULTS)
    one.run(["ip", "link", "del", "kbr0"])
    yield made
    netns.sysctl(one.ns, {key: before[key] for key in DEFAULTS})


def answers(lab: Lab, source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether a pod, as (host, pod), reaches another in both families."""
    start, end = (lab.host(host).pod(pod) for host, pod in (source, target))
    return all(
        start.run(["ping", "-c", "1", "-W", "2", str(address)], check=False).returncode == 0
        for address in end.addresses
    )


@pytest.mark.parametrize(("source", "target"), [((1, 1), (2, 1)), ((2, 1), (1, 2)), ((1, 1), (1, 2))])
def test_pods_are_reached_whatever_the_defaults_for_new_links_are(
    two: Lab, source: tuple[int, int], target: tuple[int, int]
) -> None:
    wait_for("the pods to be reached", lambda: answers(two, source, target), SOON)


def test_what_kbr0_needs_is_put_back_when_it_is_changed(two: Lab) -> None:
    one = two.host(1)
    broken = {"net/ipv4/conf/kbr0/forwarding": "0", "net/ipv4/conf/kbr0/arp_ignore": "8"}
    broken["net/ipv6/conf/kbr0/forwarding"] = "0"
    netns.sysctl(one.ns, broken)
    wanted = {**dict.fromkeys(broken, "1"), "net/ipv4/conf/kbr0/arp_ignore": "0"}

    def repaired() -> bool:
        found = sysctls(one, "net/ipv4/conf/kbr0", "net/ipv6/conf/kbr0")
        return {key: found[key] for key in wanted} == wanted

    wait_for("the settings of kbr0", repaired, SOON)
    wait_for("the pods to be reached", lambda: answers(two, (2, 1), (1, 1)), SOON)
