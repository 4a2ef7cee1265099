"""What an observation says when database or switch are away, and how long flow-restore-wait is left set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ovsmesh.agent import driver as module
from ovsmesh.agent.driver import OTHERS_GRACE, Driver
from ovsmesh.dataplane.types import Bridge, Dataplane, Observed, Unmanaged
from ovsmesh.errors import OvsmeshError
from ovsmesh.ovs.ovsdb import OvsObserved

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
            net=SimpleNamespace(observe=lambda cni: (KERNEL, self.kernel_unmanaged)),
            firewall=SimpleNamespace(observe=lambda rules: ({}, {}, ())),
            cni=SimpleNamespace(observe=lambda: ({}, [], [])),
            docker=None,
            _switch_up=False,
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
