"""The flow table, read from and written to a stand-in for ovs-ofctl that answers with real lines (OVS 3.1)."""

from __future__ import annotations

import os
import select
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovsmesh.dataplane.types import OBR
from ovsmesh.errors import OvsmeshError
from ovsmesh.ovs import openflow as module
from ovsmesh.ovs.openflow import FlowTable

COOKIE = "cookie=0x6f76736d"
OFPORTS = {OBR: 65534, "gre-web2": 5, "gre-web3": 15}
DUMP = f"""NXST_FLOW reply (xid=0x4):
 {COOKIE}, priority=0 actions=drop
 {COOKIE}, priority=100,in_port=LOCAL,dl_dst=0a:58:0a:61:02:01 actions=output:5
 {COOKIE}, priority=100,ip,in_port=5,dl_dst=0a:58:0a:61:01:01,nw_src=10.97.2.0/24 actions=LOCAL
 {COOKIE}, priority=100,ipv6,in_port=5,dl_dst=0a:58:0a:61:01:01,ipv6_src=fd00:97:2::/64 actions=LOCAL
 {COOKIE}, priority=100,in_port=LOCAL,dl_dst=0a:58:0a:61:03:01 actions=output:15
"""
FLOWS = {
    "0 ": "drop",
    "100 dl_dst=0a:58:0a:61:02:01,in_port=LOCAL": "output:gre-web2",
    "100 dl_dst=0a:58:0a:61:01:01,in_port=gre-web2,ip,nw_src=10.97.2.0/24": "LOCAL",
    "100 dl_dst=0a:58:0a:61:01:01,in_port=gre-web2,ipv6,ipv6_src=fd00:97:2::/64": "LOCAL",
    "100 dl_dst=0a:58:0a:61:03:01,in_port=LOCAL": "output:gre-web3",
}
OFCTL = """#!/bin/sh
cd {run}
case "$*" in
*dump-flows*) echo >>dumps; cat dump; exit $(cat status);;
*monitor*) echo 'NXST_FLOW_MONITOR reply (xid=0x2):'; exec cat events;;
*--bundle*) echo "$*" >argv; cat >applied; cat refusal >&2; exit $(cat status);;
esac
"""


class Switch:
    """A switch as far as FlowTable sees it: a management socket, and what ovs-ofctl says of it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(run / f"{OBR}.mgmt"))
        self.socket.listen()
        os.mkfifo(run / "events")
        self.events = os.open(run / "events", os.O_RDWR)
        for name, text in {"status": "0", "refusal": "", "dumps": "", "dump": DUMP}.items():
            (run / name).write_text(text)
        tool = run / "ovs-ofctl"
        tool.write_text(OFCTL.format(run=run))
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)

    def says(self, *lines: str) -> None:
        os.write(self.events, "".join(f"{line}\n" for line in lines).encode())

    @property
    def dumps(self) -> int:
        return (self.run / "dumps").read_text().count("\n")

    def close(self) -> None:
        os.close(self.events)
        self.socket.close()


@pytest.fixture
def switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    made = Switch(tmp_path)
    yield made
    made.close()


@pytest.fixture
def table(switch: Any) -> Iterator[Any]:
    made = FlowTable(switch.run)
    yield made
    made.close()


def changed(table: Any) -> bool:
    """What drain() says of the next that the monitor prints, which must come."""
    assert select.select(table.fds(), [], [], 30)[0], "the monitor printed nothing"
    return bool(table.drain())


# reading


def test_flows_come_with_names_and_sorted_fields(table: Any) -> None:
    assert table.observe(OFPORTS) == (FLOWS, ())


@pytest.mark.parametrize(
    "line",
    [
        f" {COOKIE}, priority=0 actions=drop",
        # with statistics, as versions without --no-stats would print
        f" {COOKIE}, table=0, priority=0 actions=drop",
    ],
)
def test_forms_of_a_managed_flow(switch: Any, table: Any, line: Any) -> None:
    (switch.run / "dump").write_text(f"NXST_FLOW reply (xid=0x4):\n{line}\n")
    assert table.observe(OFPORTS) == ({"0 ": "drop"}, ())


@pytest.mark.parametrize(
    "line",
    [
        " idle_timeout=60, priority=7,tcp,tp_dst=80 actions=drop",
        " udp actions=NORMAL",
        " table=3, priority=9,icmp actions=output:5,LOCAL",
        " cookie=0x1, priority=100,in_port=LOCAL,dl_dst=0a:58:0a:61:02:01 actions=output:5",
        " priority=0 actions=drop",
        " cookie=0x7, priority=0 actions=NORMAL",
        " cookie=what, priority=0 actions=NORMAL",
        f" cookie=0x{'6f76736d' * 9}, priority=0 actions=NORMAL",
        # managed flows never time out and are in table 0
        f" {COOKIE}, idle_timeout=60, priority=100,in_port=LOCAL,dl_dst=0a:58:0a:61:09:01 actions=output:5",
        f" {COOKIE}, table=2, priority=9,icmp actions=resubmit(,3)",
    ],
)
def test_unmanaged_flows_are_named_and_not_taken_for_managed(switch: Any, table: Any, line: Any) -> None:
    (switch.run / "dump").write_text(f"NXST_FLOW reply (xid=0x4):\n{line}\n {COOKIE}, priority=0 actions=drop\n")
    flows, unmanaged = table.observe(OFPORTS)
    assert flows == {"0 ": "drop"}
    assert [(f.kind, f.blocks) for f in unmanaged] == [("flows", False)]
    assert f"flow {line.strip()} in obr0 is not managed by ovsmesh" in unmanaged[0].detail


@pytest.mark.parametrize("line", [" priority=0 actions=NORMAL", " cookie=0x0, priority=0 actions=NORMAL"])
def test_the_flow_of_standalone_mode_is_not_named(switch: Any, table: Any, line: Any) -> None:
    (switch.run / "dump").write_text(f"NXST_FLOW reply (xid=0x4):\n{line}\n")
    assert table.observe(OFPORTS) == ({}, ())


def test_a_flow_without_priority_and_match(switch: Any, table: Any) -> None:
    # it drops all, and it is managed by its cookie: it must go
    (switch.run / "dump").write_text(f"{DUMP} {COOKIE}, actions=drop\n {COOKIE}, udp actions=NORMAL\n")
    flows, unmanaged = table.observe(OFPORTS)
    assert flows == FLOWS | {"32768 ": "drop", "32768 udp": "NORMAL"}
    assert unmanaged == ()


def test_a_port_without_a_name_keeps_its_number(table: Any) -> None:
    flows, _ = table.observe({"gre-web3": 15})
    assert flows["100 dl_dst=0a:58:0a:61:02:01,in_port=LOCAL"] == "output:5"
    assert flows["100 dl_dst=0a:58:0a:61:03:01,in_port=LOCAL"] == "output:gre-web3"


def test_a_port_made_again_under_another_number_is_drift(switch: Any, table: Any) -> None:
    table.observe(OFPORTS)
    flows, _ = table.observe(OFPORTS | {"gre-web2": 99})
    assert "100 dl_dst=0a:58:0a:61:01:01,in_port=5,ip,nw_src=10.97.2.0/24" in flows
    assert flows["100 dl_dst=0a:58:0a:61:02:01,in_port=LOCAL"] == "output:5"
    assert flows["100 dl_dst=0a:58:0a:61:03:01,in_port=LOCAL"] == "output:gre-web3"
    # and names that change places are seen too
    flows, _ = table.observe({"gre-web2": 15, "gre-web3": 5})
    assert flows["100 dl_dst=0a:58:0a:61:02:01,in_port=LOCAL"] == "output:gre-web3"
    assert switch.dumps == 1


def test_no_switch_is_none(tmp_path: Path) -> None:
    assert FlowTable(tmp_path).observe(OFPORTS) is None


def test_a_dump_that_fails_is_none(switch: Any, table: Any) -> None:
    (switch.run / "status").write_text("1")
    assert table.observe(OFPORTS) is None


# the monitor


ADDED = "event=ADDED table=0 cookie=0x6f76736d"
DELETED = "event=DELETED reason=delete table=0 cookie=0x6f76736d"


@pytest.mark.parametrize(
    "line",
    [
        f" {ADDED} in_port=LOCAL,dl_dst=0a:58:0a:61:02:01 actions=output:5",
        f" {ADDED} ip,in_port=5,dl_dst=0a:58:0a:61:01:01,nw_src=10.97.2.0/24 actions=LOCAL",
        f" {ADDED.replace('ADDED', 'MODIFIED')} in_port=LOCAL,dl_dst=0a:58:0a:61:02:01 actions=output:5",
        f" {DELETED} in_port=LOCAL,dl_dst=0a:58:0a:61:09:01 actions=output:9",
        "NXST_FLOW_MONITOR reply (xid=0x0):",
    ],
)
def test_what_is_known_already_is_no_change(switch: Any, table: Any, line: Any) -> None:
    table.observe(OFPORTS)
    switch.says(line)
    assert not changed(table)
    table.observe(OFPORTS)
    assert switch.dumps == 1


@pytest.mark.parametrize(
    "line",
    [
        f" {DELETED} in_port=LOCAL,dl_dst=0a:58:0a:61:02:01 actions=output:5",
        f" {DELETED} ",
        # the default flow, or another that drops all: the line has no priority to tell them apart
        f" {ADDED} ",
        f" {ADDED}",
        " event=DELETED reason=delete table=0 cookie=0 udp actions=NORMAL",
        " event=MODIFIED table=0 cookie=0 in_port=LOCAL,dl_dst=0a:58:0a:61:02:01 actions=output:6",
        f" {ADDED} in_port=LOCAL,dl_dst=0a:58:0a:61:02:01 actions=output:6",
        f" {ADDED} in_port=LOCAL,dl_dst=0a:58:0a:61:09:01 actions=output:5",
        " event=ADDED table=0 cookie=0 in_port=LOCAL,dl_dst=0a:58:0a:61:02:01 actions=output:5",
        " event=ADDED table=0 cookie=0 udp actions=NORMAL",
        " event=ADDED table=0 idle_timeout=60 cookie=0 tcp,tp_dst=80",
        " event=ADDED table=3 cookie=0x6f76736d icmp actions=output:5,LOCAL",
        " event=SOMETHING of a version to come",
    ],
)
def test_what_is_new_is_a_change_and_is_read_again(switch: Any, table: Any, line: Any) -> None:
    table.observe(OFPORTS)
    switch.says("NXST_FLOW_MONITOR reply (xid=0x0):", line)
    assert changed(table)
    table.observe(OFPORTS)
    assert switch.dumps == 2


def test_a_line_that_comes_in_two_pieces(switch: Any, table: Any) -> None:
    table.observe(OFPORTS)
    os.write(switch.events, f" {ADDED} in_port=LOCAL,dl_dst=0a:58:0a:61:".encode())
    assert not changed(table)
    os.write(switch.events, b"02:01 actions=output:5\n")
    assert not changed(table)
    os.write(switch.events, b" event=ADDED table=0 cookie=0 ud")
    assert not changed(table)
    os.write(switch.events, b"p actions=NORMAL\n")
    assert changed(table)


def test_the_table_is_read_once_and_again_when_told(switch: Any, table: Any) -> None:
    for _ in range(3):
        table.observe(OFPORTS)
    assert switch.dumps == 1
    table.dirty()
    table.observe(OFPORTS)
    assert switch.dumps == 2


def count_reply(number: str, flows: int) -> str:
    return f"OFPST_AGGREGATE reply (xid=0x{int(number, 16):x}): packet_count=7 byte_count=686 flow_count={flows}"


@pytest.mark.parametrize(
    ("told", "read_again"),
    [
        ([], True),
        ([5], False),
        ([6], True),
        ([4], True),
        # a change that the monitor tells before it answers
        ([" event=ADDED table=0 cookie=0x6f76736d in_port=9,ip", 5], True),
    ],
)
def test_in_doubt_the_number_of_flows_decides_whether_the_table_is_read(
    switch: Any, table: Any, monkeypatch: pytest.MonkeyPatch, told: list[Any], read_again: bool
) -> None:
    def send(path: str, method: str, params: list[str]) -> str:
        assert Path(path) == switch.run / f"ovs-ofctl.{table._monitor.pid}.ctl"
        assert method == "ofctl/send" and len(bytes.fromhex(params[0])) == 56
        switch.says(*(line if isinstance(line, str) else count_reply(params[0][8:16], line) for line in told))
        return "sent"

    monkeypatch.setattr(module, "request", send)
    monkeypatch.setattr(module, "COUNT_DEADLINE", 30.0 if told else 0.2)
    (switch.run / "dump").write_text(DUMP)
    table.observe(OFPORTS)
    for _ in range(2):
        table.dirty()
        table.observe(OFPORTS)
    assert switch.dumps == (3 if read_again else 1)


def test_a_monitor_that_can_t_be_asked_has_the_table_read(
    switch: Any, table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "request", lambda *_: None)
    table.observe(OFPORTS)
    table.dirty()
    table.observe(OFPORTS)
    assert switch.dumps == 2


def test_the_end_of_the_monitor_is_a_change(switch: Any, table: Any) -> None:
    table.observe(OFPORTS)
    table._monitor.terminate()
    assert changed(table)
    assert table.fds() == []
    assert table.observe(OFPORTS) is not None and switch.dumps == 2


def test_nothing_is_left_of_the_monitor(switch: Any, table: Any) -> None:
    table.observe(OFPORTS)
    monitor = table._monitor
    table.close()
    assert monitor.poll() is not None
    assert table.fds() == []


# writing


def test_one_bundle_with_numbers_for_names(switch: Any, table: Any) -> None:
    table.observe(OFPORTS)
    gone = "100 dl_dst=0a:58:0a:61:01:01,in_port=gre-web2,ip,nw_src=10.97.2.0/24"
    table.apply(
        {"100 dl_dst=0a:58:0a:61:09:01,in_port=LOCAL": "output:gre-web3", "0 ": "drop"},
        [gone, "50 in_port=7"],
        OFPORTS,
    )
    assert (switch.run / "applied").read_text().splitlines() == [
        f"add {COOKIE},priority=100,dl_dst=0a:58:0a:61:09:01,in_port=LOCAL,actions=output:15",
        f"add {COOKIE},priority=0,actions=drop",
        "delete_strict priority=100,dl_dst=0a:58:0a:61:01:01,in_port=5,ip,nw_src=10.97.2.0/24",
        "delete_strict priority=50,in_port=7",
    ]
    assert "--bundle add-flows" in (switch.run / "argv").read_text()
    # what was written is known, without a look
    flows, _ = table.observe(OFPORTS)
    assert flows == {k: v for k, v in FLOWS.items() if k != gone} | {
        "100 dl_dst=0a:58:0a:61:09:01,in_port=LOCAL": "output:gre-web3"
    }
    assert switch.dumps == 1


def test_what_is_replaced_is_not_deleted_after(switch: Any, table: Any) -> None:
    # under its number before, under its name now: one and the same flow to the switch
    table.apply({"100 in_port=gre-web2": "LOCAL"}, ["100 in_port=5"], OFPORTS)
    assert (switch.run / "applied").read_text() == f"add {COOKIE},priority=100,in_port=5,actions=LOCAL\n"


def test_a_refusal_is_told_and_the_table_read_again(switch: Any, table: Any) -> None:
    table.observe(OFPORTS)
    (switch.run / "status").write_text("1")
    (switch.run / "refusal").write_text("OFPT_ERROR (OF1.4) (xid=0x6): OFPBFC_MSG_FAILED\nmore\n")
    with pytest.raises(OvsmeshError, match=r"the switch refused 1 flow change on obr0: OFPT_ERROR .* / more"):
        table.apply({"0 ": "drop"}, [], OFPORTS)
    (switch.run / "status").write_text("0")
    table.observe(OFPORTS)
    assert switch.dumps == 2


def test_a_port_that_has_no_number_is_named_and_nothing_is_sent(switch: Any, table: Any) -> None:
    with pytest.raises(OvsmeshError, match="port gre-web9 has no OpenFlow number"):
        table.apply({"0 ": "drop", "100 in_port=LOCAL": "output:gre-web9"}, [], OFPORTS)
    assert not (switch.run / "applied").exists()


def test_no_tool_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OvsmeshError, match=r"can't run ovs-ofctl: .*; install Open vSwitch's tools"):
        FlowTable(tmp_path).apply({"0 ": "drop"}, [], {})


def test_no_tool_is_not_taken_for_a_switch_that_is_down(
    switch: Any, table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/setpriv").symlink_to(shutil.which("setpriv") or "/usr/bin/env")
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    with pytest.raises(OvsmeshError, match=r"can't run ovs-ofctl: .*; install Open vSwitch's tools"):
        table.observe(OFPORTS)


# both ways


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(1, 60), max_size=12), st.randoms(use_true_random=False))
def test_what_is_written_is_read_back_the_same(switch: Any, table: Any, peers: Any, chance: Any) -> None:
    numbers = list(range(1, 65))
    chance.shuffle(numbers)
    ofports = {f"gre-web{p}": number for p, number in zip(sorted(peers), numbers, strict=False)}
    flows = {"0 ": "drop"}
    for p in peers:
        flows[f"100 dl_dst=0a:58:0a:61:{p:02x}:01,in_port=LOCAL"] = f"output:gre-web{p}"
        flows[f"100 dl_dst=0a:58:0a:61:01:01,in_port=gre-web{p},ip,nw_src=10.97.{p}.0/24"] = "LOCAL"
    table.apply(flows, [], ofports)
    # "add COOKIE,priority=N,MATCH,actions=A" as the switch prints it
    lines = []
    for line in (switch.run / "applied").read_text().splitlines():
        head, _, actions = line.removeprefix(f"add {COOKIE},").rpartition(",actions=")
        priority, *fields = head.split(",")
        chance.shuffle(fields)
        lines.append(f" {COOKIE}, {','.join([priority, *fields])} actions={actions}\n")
    (switch.run / "dump").write_text("".join(lines))
    table.dirty()
    assert table.observe(ofports) == (flows, ())
