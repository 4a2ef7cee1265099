"""What a host needs: each thing that can be missing is one line, and all of them are reported."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ovsmesh.cli import preflight
from ovsmesh.cli.preflight import FAIL, OK, WARN, Check
from tests.support.meshkit import first

MESH = first(3)


def states(checks: Any) -> Any:
    return [(check.state, check.name) for check in checks]


@pytest.mark.parametrize(
    ("route", "state"),
    [
        ({"dst": "default", "dev": "eth0"}, OK),
        ({"dst": "172.17.0.0/16", "dev": "docker0"}, OK),
        ({"dst": "10.97.1.0/24", "dev": "kbr0", "protocol": "2"}, OK),
        ({"dst": "10.97.2.0/24", "dev": "wg0", "protocol": "111"}, OK),
        ({"dst": "10.97.2.0/24", "dev": "wg0"}, FAIL),
        ({"dst": "10.97.2.7", "dev": "wg0"}, FAIL),
        ({"dst": "fd00:97:3::/64", "dev": "wg0"}, FAIL),
        ({"dst": "10.0.0.0/8", "dev": "vpn"}, WARN),
        ({"dst": "10.97.200.0/24", "dev": "docker0"}, WARN),
        ({"dst": "not a route"}, OK),
        ({}, OK),
    ],
)
def test_routes_in_the_meshs_ranges(route: Any, state: Any) -> None:
    assert states(preflight.ranges(MESH, [route])) == [(state, "ranges")]


def chain(policy: Any = "accept", hook: Any = "input", name: Any = "input") -> Any:
    return {"chain": {"family": "ip", "table": "filter", "name": name, "hook": hook, "policy": policy}}


def rule(*expr: Any, chain: Any = "input") -> Any:
    return {"rule": {"family": "ip", "table": "filter", "chain": chain, "expr": list(expr)}}


GRE = {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "protocol"}}, "right": "gre"}}
NUMBER = {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": 47}}
TCP = {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "protocol"}}, "right": "tcp"}}


@pytest.mark.parametrize(
    ("ruleset", "closed"),
    [
        ([], False),
        ([chain()], False),
        ([chain("drop")], True),
        ([chain("drop", hook="forward")], False),
        ([chain("drop"), rule(TCP, {"accept": None})], True),
        ([chain("drop"), rule(GRE, {"accept": None})], False),
        ([chain("drop"), rule({"jump": {"target": "x"}}), rule(NUMBER, {"accept": None}, chain="x")], False),
        # as firewalld and many a hand-written file do it
        ([chain(), rule(TCP, {"accept": None}), rule({"counter": {}}, {"reject": {"type": "icmpx"}})], True),
        ([chain(), rule({"reject": None}, TCP)], False),
    ],
)
def test_filters_that_keep_gre_out(ruleset: Any, closed: Any) -> None:
    assert bool(preflight._closed(json.dumps({"nftables": [{"metainfo": {}}, *ruleset]}), "gre")) == closed


@pytest.mark.parametrize("text", [None, "", "no JSON", "[]", '{"nftables": [1]}', '{"nftables": [{"rule": {}}]}'])
def test_the_output_of_nft_may_be_anything(text: Any) -> None:
    assert preflight._closed(text, "gre") == []


def test_open_vswitch(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"ovs-appctl": "ovs-vswitchd (Open vSwitch) 3.1.0", "modprobe": ""}
    monkeypatch.setattr(preflight, "output", lambda *argv: answers.get(argv[0]))

    def found(
        synced: Any = True, version: Any = "3.1.0", datapath: Any = True, carried: Any = False, kind: Any = "gre"
    ) -> Any:
        return states(preflight.switch(synced, version, "unix:/x", datapath, carried, kind))

    good = [(OK, "openvswitch"), (OK, "datapath")]
    assert found() == good and found(datapath=False, carried=True) == good and found(version="") == good
    assert found(synced=False) == [(FAIL, "openvswitch")]
    assert found(version="2.9.5") == [(FAIL, "openvswitch"), (OK, "datapath")]
    assert found(datapath=False) == [(OK, "openvswitch"), (FAIL, "datapath")]
    answers.clear()
    assert found(kind="nonsense") == [(FAIL, "openvswitch"), (FAIL, "datapath")]


def test_tools_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovsmesh.cli.preflight.shutil.which", lambda tool: None)
    (check,) = preflight.tools()
    assert check.state == FAIL and "apt-get install iproute2 nftables openvswitch-switch" in check.text


def test_the_kernel_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovsmesh.cli.preflight.os.uname", lambda: type("U", (), {"release": "4.19.0-21-amd64"}))
    assert next(preflight.kernel()).state == FAIL
    monkeypatch.setattr("ovsmesh.cli.preflight.os.uname", lambda: type("U", (), {"release": "5.0.0"}))
    assert next(preflight.kernel()).state == OK


def test_a_line() -> None:
    assert str(Check(FAIL, "mtu", "is too low")) == "FAIL  mtu          is too low"
