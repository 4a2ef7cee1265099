"""What an observation says when database or switch are away, and how long flow-restore-wait is left set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ovsmesh.agent import driver as module
from ovsmesh.agent.driver import OTHERS_GRACE, Driver
from ovsmesh.containers.forwarding import FORWARDING
from ovsmesh.dataplane.types import Bridge, Dataplane, Link, Observed, Port, Unmanaged
from ovsmesh.errors import OvsmeshError
from ovsmesh.ovs.ovsdb import OvsObserved
from ovsmesh.sysctl import Sysctls
from tests.support.meshkit import first

FLOWS = {"0 ": "drop"}
BRIDGE = {"obr0": Bridge("netdev")}
KERNEL: dict[str, dict[str, Any]] = {kind: {} for kind in ("links", "addresses", "neighbours", "fdb", "routes")}


class Host:
    """A driver on a host whose parts are values."""

    def __init__(self) -> None:
        self.database = OvsObserved(BRIDGE, {}, {}, [], [])
        self.kernel_unmanaged: list[Unmanaged] = []
        self.flows: Any = (FLOWS, ())
        """None: the switch does not answer; an exception: it can't be asked."""
        self.others = False
        self.links = {"obr0", "gre_sys"}
        self.driver = Driver.__new__(Driver)
        vars(self.driver).update(
            ovs=SimpleNamespace(
                synced=True,
                remote="unix:/db.sock",
                ofports={"obr0": 65534},
                observe=lambda: self.database,
                others_restore=lambda: self.others,
            ),
            flows=SimpleNamespace(known=True, observe=self._flows),
            net=SimpleNamespace(
                observe=lambda cni: (KERNEL, self.kernel_unmanaged),
                present=lambda name: name in self.links,
                problems=tuple,
            ),
            firewall=SimpleNamespace(observe=lambda rules: ({}, {}, ())),
            cni=SimpleNamespace(observe=lambda: ({}, [], [])),
            docker=None,
            _sysctls=Sysctls(),
            _switch_up=False,
            _look_closer=False,
            _restore_since=None,
        )

    def _flows(self, ofports: Any) -> Any:
        if isinstance(self.flows, Exception):
            raise self.flows
        return self.flows

    def observe(self) -> Observed:
        return self.driver.observe(Dataplane())


@pytest.fixture
def host() -> Host:
    return Host()


def reasons(found: Observed) -> list[str]:
    return [problem.reason for problem in found.problems]


def test_all_is_known_while_database_and_switch_answer(host: Host) -> None:
    found = host.observe()
    assert found.dataplane.flows == FLOWS and found.dataplane.bridges == BRIDGE
    assert not found.unknown and not found.problems and not host.driver.switch_lost


def test_without_the_database_its_kinds_are_unknown_and_the_flows_are_not(host: Host) -> None:
    host.driver.ovs.synced = False  # type: ignore[misc]
    found = host.observe()
    assert reasons(found) == ["DatabaseDown"] and "unix:/db.sock" in found.problems[0].message
    assert found.unknown == {"bridges", "ports", "restore_wait"} and found.dataplane.flows == FLOWS


def test_without_database_and_switch_the_flows_are_unknown_too(host: Host) -> None:
    host.driver.ovs.synced, host.flows = False, None  # type: ignore[misc]
    found = host.observe()
    assert reasons(found) == ["DatabaseDown"] and "flows" in found.unknown and not found.dataplane.flows


@pytest.mark.parametrize("flows", [None, OvsmeshError("there is no ovs-ofctl")], ids=["silent", "no ovs-ofctl"])
def test_a_switch_that_does_not_answer_is_named_and_its_flows_are_unknown(host: Host, flows: Any) -> None:
    host.flows = flows
    found = host.observe()
    assert reasons(found) == [*["SwitchUnseen"] * (flows is not None), "SwitchDown"]
    assert found.unknown == {"flows"} and host.driver.switch_lost


def test_a_host_without_its_bridge_has_no_flows_and_misses_no_switch(host: Host) -> None:
    host.database, host.flows = OvsObserved({}, {}, {}, [], []), None
    found = host.observe()
    assert not found.unknown and not found.problems and not host.driver.switch_lost


def test_an_unmanaged_bridge_is_named_once(host: Host) -> None:
    host.database = OvsObserved({}, {}, {}, [Unmanaged("bridges", "obr0", "the bridge")], [])
    host.kernel_unmanaged = [Unmanaged("links", "obr0", "the link"), Unmanaged("links", "kbr0", "another")]
    assert [f.detail for f in host.observe().unmanaged] == ["another", "the bridge"]


def test_flow_restore_wait_is_left_to_others_for_a_while_only(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    host.database, host.others = OvsObserved(BRIDGE, {}, {"flow-restore-wait": True}, [], []), True
    assert host.observe().unknown == {"restore_wait"}
    now[0] += OTHERS_GRACE - 1
    assert host.observe().unknown == {"restore_wait"} and not host.driver.restore_overdue()
    now[0] += 1
    assert not host.observe().unknown and host.driver.restore_overdue()
    # set again later, it is left for as long again
    host.database = OvsObserved(BRIDGE, {}, {}, [], [])
    host.observe()
    host.database = OvsObserved(BRIDGE, {}, {"flow-restore-wait": True}, [], [])
    assert host.observe().unknown == {"restore_wait"}
    host.others = False
    assert not host.observe().unknown


PORTS = {"gre-web2": Port("gre", "192.0.2.12", "192.0.2.11", "", "web2", "")}


@pytest.mark.parametrize(
    ("kind", "links", "told", "closer", "lost"),
    [
        ("system", "obr0 gre_sys", None, False, False),
        # nobody is asked: the link says it
        ("system", "gre_sys", {"gre"}, False, True),
        ("netdev", "", {"gre"}, False, True),
        ("system", "obr0", {"internal"}, False, True),
        # a kernel that calls it otherwise, a switch that does not tell
        ("system", "obr0", {"internal", "gre"}, False, False),
        ("system", "obr0", {"ip6gre"}, False, False),
        ("system", "obr0", None, False, False),
        # the userspace datapath has no such link: it shows only when all is read again
        ("netdev", "obr0", {"tap"}, False, False),
        ("netdev", "obr0", {"tap"}, True, True),
        ("netdev", "obr0", {"tap", "gre"}, True, False),
    ],
)
def test_a_bridge_whose_devices_are_gone_is_not_as_wanted(
    host: Host, monkeypatch: pytest.MonkeyPatch, kind: str, links: str, told: set[str] | None, closer: bool, lost: bool
) -> None:
    monkeypatch.setattr(module, "port_types", lambda run_dir: told)
    host.database = OvsObserved({"obr0": Bridge(kind)}, PORTS, {}, [], [])
    host.links, host.driver._look_closer = set(links.split()), closer
    host.driver.ovs.ofports = {"obr0": 65534, "gre-web2": 1}
    assert host.observe().dataplane.bridges == {"obr0": Bridge(kind, devices_lost=lost)}
    assert not host.driver._look_closer


def test_a_port_that_the_switch_has_not_made_yet_has_lost_nothing(host: Host) -> None:
    host.database, host.links = OvsObserved({"obr0": Bridge("system")}, PORTS, {}, [], []), {"obr0"}
    assert host.observe().dataplane.bridges == {"obr0": Bridge("system")}


def test_the_devices_of_a_switch_that_is_down_are_not_missed(host: Host) -> None:
    host.flows, host.links = None, set()
    assert host.observe().dataplane.bridges == BRIDGE


@pytest.mark.parametrize(("kbr", "requested", "kept"), [(8962, 1462, 8962), (0, 8962, 8962), (0, 0, None)])
def test_the_mtu_in_place_is_kbr0s_or_after_a_reboot_the_databases(
    host: Host, kbr: int, requested: int, kept: int | None
) -> None:
    links = {"kbr0": Link("bridge", kbr)} if kbr else {}
    host.driver.net.cache = SimpleNamespace(managed_links=lambda: (links, []))  # type: ignore[assignment]
    host.database = OvsObserved({"obr0": Bridge("netdev", mtu_request=requested)}, {}, {}, [], [])
    assert host.driver._present_mtu() == kept
    host.database = OvsObserved({}, {}, {}, [], [])
    assert host.driver._present_mtu() == (kbr or None)


def test_a_route_keeps_its_smaller_mtu_until_the_probes_know(host: Host) -> None:
    """An agent that has just started, and a command beside it, know nothing of the paths."""
    mesh = first(4)
    host.driver.net.small_routes = lambda: {"10.97.2.0/24": 1400, "10.97.3.0/24": 1300}  # type: ignore[method-assign]
    assert host.driver._path_mtus(mesh, {}) == {"web2": 1400, "web3": 1300}
    probed = {"web2": None, "web4": 1200, "web3": 1350}
    assert host.driver._path_mtus(mesh, probed) == {"web3": 1350, "web4": 1200}


@pytest.mark.parametrize(
    ("addresses", "exits", "limited"),
    [
        (("fd00:d0c::1/64", "172.17.0.1/16"), (), (4,)),
        (("fe80::1/64", "172.17.0.1/16"), (), (4, 6)),
        (("2001:db8::7/64",), ("br0",), (4, 6)),
    ],
    ids=["a range", "link-local alone", "the way out"],
)
def test_ipv6_is_not_limited_where_a_bridge_of_others_is_to_be_forwarded(
    host: Host, addresses: tuple[str, ...], exits: tuple[str, ...], limited: tuple[int, ...]
) -> None:
    cache = SimpleNamespace(bridges=lambda: ("br0",), addresses_of=lambda name: addresses)
    vars(host.driver).update(
        net=SimpleNamespace(cache=cache, exits=lambda: exits),
        firewall=SimpleNamespace(forward_limited=set, open_ipv6=bool),
        _found_off={4, 6},
        _found_on=set(),
        _configured=dict.fromkeys(FORWARDING, False),
    )
    assert host.driver._forward_limited([4, 6]) == limited
