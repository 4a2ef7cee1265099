"""A plan is carried out in an order in which no packet is lost, and a step that fails stops no other."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from ovsmesh.agent import apply as module
from ovsmesh.agent.apply import Apply
from ovsmesh.dataplane.plan import plan
from ovsmesh.dataplane.types import Dataplane, Facts
from ovsmesh.errors import OvsmeshError
from tests.support.meshkit import first, seen, want

CNI = {"90-ovsmesh.conflist": "{}"}
"""Stands for a conflist: its text does not matter here."""


class Recorder:
    """Drivers that write down what they are told, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fails: set[str] = set()
        self.without_port: set[str] = set()
        self.docker = None
        self.ovs = SimpleNamespace(apply=self._ports, ofports={"obr0": 65534}, errors={})
        self.net = SimpleNamespace(
            set_link=lambda name, want, have: self._note(f"link {name}"),
            del_link=lambda name: self._note(f"-link {name}"),
            message=lambda op, kind, key, value: b"",
            batch=self._batch,
            drain=lambda: None,
        )
        self.flows = SimpleNamespace(
            apply=lambda add, delete, ports: self._note(*["flows"] * bool(add), *["-flows"] * bool(delete))
        )
        self.firewall = SimpleNamespace(apply=lambda rules, peers: self._note("filter"))
        self.cni = SimpleNamespace(apply=lambda steps: self._note(*(f"{step.op}cni" for step in steps)))
        monkeypatch.setattr(module, "write_sysctl", lambda key, value: self._note("sysctl"))

    def restore_overdue(self) -> bool:
        return False

    def _note(self, *calls: str) -> None:
        for call in calls:
            if self.calls[-1:] != [call]:
                self.calls.append(call)
            if call in self.fails:
                raise OvsmeshError(f"{call}: no")

    def _ports(
        self, bridge: Any, ports: Any, delete: Any, remove: bool = False, clear: bool = False, meanwhile: Any = None
    ) -> None:
        self._note(f"ports +{len(ports)} -{len(delete)}")
        self.ovs.ofports |= {name: 1 for name in ports if name not in self.without_port}
        if meanwhile:
            meanwhile()

    def _batch(self, messages: Any) -> dict[Any, str]:
        self._note(*dict.fromkeys(f"{'-' if step.op == '-' else ''}{step.kind}" for step, _ in messages))
        return {}

    def run(self, want: Dataplane, have: Dataplane) -> list[str]:
        """Carry out the difference and return what failed."""
        self.calls.clear()
        self.ovs.ofports = {"obr0": 65534} | dict.fromkeys(have.ports, 1)
        todo = plan(want, seen(have), confirmed=True)
        return list(map(str, Apply(self, todo, want).run()))  # type: ignore[arg-type]


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def with_cni(dataplane: Dataplane) -> Dataplane:
    return dataclasses.replace(dataplane, cni=CNI)


def test_a_node_is_made_from_the_ground_up_and_pods_come_last(drivers: Recorder) -> None:
    assert drivers.run(with_cni(want(first(3))), Dataplane()) == []
    order = ["link kbr0", "ports +2 -0", "filter", "flows", "link obr0", "sysctl"]
    assert drivers.calls == [*order, "addresses", "neighbours", "fdb", "routes", "+cni"]


def test_a_node_is_taken_down_from_the_top_and_pods_go_first(drivers: Recorder) -> None:
    here = dataclasses.replace(with_cni(want(first(3))), sysctls={})
    assert drivers.run(Dataplane(), here) == []
    order = ["-cni", "-routes", "-fdb", "-neighbours", "-addresses", "ports +0 -2"]
    assert drivers.calls[: len(order)] == order
    assert "-flows" not in drivers.calls, "they go with their bridge"
    assert drivers.calls[len(order) :] == ["filter", "-link kbr0"]


def test_what_leads_to_a_peer_goes_before_its_port(drivers: Recorder) -> None:
    drivers.run(want(first(3)), want(first(4)))
    assert drivers.calls == ["-routes", "-fdb", "-neighbours", "ports +0 -1", "-flows", "filter"]


def test_a_port_in_place_of_another_is_made_in_the_same_transaction(drivers: Recorder) -> None:
    here = want(first(2))
    name, port = next(iter(here.ports.items()))
    there = dataclasses.replace(here, ports={"gre-old": port})
    drivers.run(here, there)
    assert name != "gre-old" and [call for call in drivers.calls if call.startswith("ports")] == ["ports +1 -1"]


def test_without_its_bridge_no_kernel_table_is_written(drivers: Recorder) -> None:
    drivers.fails = {"link kbr0"}
    assert drivers.run(want(first(2)), Dataplane()) == ["link kbr0: link kbr0: no"]
    assert "flows" in drivers.calls and not {"addresses", "routes"} & set(drivers.calls)


def test_a_port_that_the_switch_can_not_make_holds_back_its_own_flows_only(drivers: Recorder) -> None:
    drivers.without_port = {"gre-web2"}
    drivers.ovs.errors = {"gre-web2": "no such device"}
    (failed,) = drivers.run(want(first(3)), Dataplane())
    assert failed == "flows: ovs-vswitchd could not make 1 ports, the first gre-web2: no such device"
    assert "flows" in drivers.calls and "routes" in drivers.calls


@pytest.mark.parametrize("failing", ["ports +2 -0", "flows", "link obr0", "sysctl"])
def test_a_part_that_fails_stops_no_other(drivers: Recorder, failing: str) -> None:
    whole = with_cni(want(first(3), facts=Facts(1500)))
    drivers.run(whole, Dataplane())
    every = list(drivers.calls)
    drivers.fails = {failing}
    assert len(drivers.run(whole, Dataplane())) >= 1
    assert {*every} - {*drivers.calls} <= ({"flows", "filter"} if failing.startswith("ports") else set())
