"""Record changes of a host's dataplane as they happen, each with its time: rtnetlink, nft, OVSDB, flows.

Times are CLOCK_MONOTONIC seconds at which this process read the notification. ovsmesh.linux decodes rtnetlink;
`Testbed.check` confirms the result without that decoder.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Collection
from ipaddress import ip_address
from types import TracebackType
from typing import Any

from pyroute2.netlink.nfnetlink import nfgen_msg

from ovsmesh.lab.host import Host
from ovsmesh.lab.netns import LabError, within
from ovsmesh.linux import netlink_socket, rtnetlink
from ovsmesh.linux import rtnetlink_parser as parser
from ovsmesh.linux.netlink_socket import Message, NetlinkSocket

_RT_GROUPS = (1, 3, 5, 7, 8, 9, 11, 19, 24, 25)
"""RTNLGRP_ LINK, NEIGH, IPV4_ IFADDR ROUTE RULE, IPV6_ IFADDR ROUTE RULE, IPV4_NETCONF, IPV6_NETCONF."""
_REQUEST = 1
_NFT_GROUP, _NFT_SUBSYSTEM = 7, 10
_RECEIVE_BYTES = 64 << 20
_NEWSETELEM, _DELSETELEM, _NEWGEN, _GETGEN = 12, 14, 15, 16
_EVENT = re.compile(r"^ event=(ADDED|DELETED|MODIFIED) (?:reason=\S+ )?table=\d+ cookie=(\S+) ?(.*)$")

Event = tuple[str, ...]
"""("route+", DST), ("neigh-", IP), ("fdb+", MAC), ("nft+", ADDRESS), ("gen",), ("port+", NAME), ("port-", NAME),
("settled",) when ovs-vswitchd has taken over all, ("flow+", MATCH), ("flow-", MATCH), ("flow~", MATCH), …"""


def generation(ns: str) -> int:
    """Return the number of nft transactions in this namespace so far."""
    request = nfgen_msg()
    request["header"].update(type=_NFT_SUBSYSTEM << 8 | _GETGEN, flags=_REQUEST)
    request.encode()
    found: list[Message] = []
    with within(ns, lambda: NetlinkSocket(netlink_socket.NETFILTER)) as sock:
        sock.request(bytes(request.data), found.append)
    return int(struct.unpack_from("!I", found[0].payload, 8)[0])


class EventProbe:
    """Collects events until it is closed. `flows` and `database` add those doors; rtnetlink and nft are always open.

    `addresses`: the set elements of interest, for ("nft+", …) and ("nft-", …).
    """

    def __init__(self, host: Host, *, flows: bool = True, database: bool = True) -> None:
        self.events: list[tuple[float, Event]] = []
        self.addresses: set[str] = set()
        self.ports: dict[str, int] = {}
        """Name of each interface → its OpenFlow port number, 0 for none."""
        self.table: dict[str, str] = {}
        """Match of each flow (numbers for ports) → its actions."""
        self._uuids: dict[str, str] = {}
        self._cfg = (0, 0)
        self._poll = select.poll()
        self._rt = within(host.ns, lambda: NetlinkSocket(netlink_socket.ROUTE, _RT_GROUPS, _RECEIVE_BYTES))
        self._nft = within(host.ns, lambda: NetlinkSocket(netlink_socket.NETFILTER, [_NFT_GROUP], _RECEIVE_BYTES))
        self._db: socket.socket | None = None
        self._text = ""
        self._decoder = json.JSONDecoder()
        self._monitor: subprocess.Popen[bytes] | None = None
        self._tty = -1
        self._line = b""
        for sock in (self._rt, self._nft):
            self._poll.register(sock, select.POLLIN)
        if database:
            self._open_database(host)
        if flows:
            self._open_flows(host)

    def __enter__(self) -> EventProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in (self._rt, self._nft, self._db):
            if sock:
                sock.close()
        if self._monitor:
            os.close(self._tty)
            self._monitor.send_signal(signal.SIGTERM)
            self._monitor.wait(10)

    def _watch(self, what: socket.socket | int) -> None:
        os.set_blocking(what if isinstance(what, int) else what.fileno(), False)
        self._poll.register(what, select.POLLIN)

    def _open_database(self, host: Host) -> None:
        self._db = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._db.connect(str(host.state / "db.sock"))
        columns = {
            "Interface": {"columns": ["name", "ofport"]},
            "Open_vSwitch": {"columns": ["next_cfg", "cur_cfg"]},
        }
        request = {"method": "monitor", "params": ["Open_vSwitch", "bench", columns], "id": 1}
        self._db.sendall(json.dumps(request).encode())
        self._watch(self._db)

    def _open_flows(self, host: Host) -> None:
        self._tty, slave = pty.openpty()
        try:
            argv = ["ovs-ofctl", "--no-names", "monitor", f"unix:{host.state}/obr0.mgmt", "watch:"]
            env = os.environ | host.env
            self._monitor = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=env)
        finally:
            os.close(slave)
        self._watch(self._tty)

    # --- taking in

    def look(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for an event, and take in all that has come."""
        for fd, _ in self._poll.poll(max(0.0, timeout) * 1000):
            if fd == self._rt.fileno():
                self._take_rt()
            elif fd == self._nft.fileno():
                self._take_nft()
            elif fd == self._tty:
                self._take_flows()
            else:
                self._take_database()

    def quiet(self, seconds: float, most: float = 30.0) -> None:
        """Take in events until none came for `seconds`, or for `most` seconds."""
        until = time.monotonic() + most
        while time.monotonic() < until:
            before = len(self.events)
            self.look(seconds)
            if len(self.events) == before:
                return

    def clear(self) -> None:
        """Take in what has come, and forget all events."""
        self.look(0)
        self.events.clear()

    def rest(self, seconds: float) -> None:
        """Take in events for so long, then forget all."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.look(left)
        self.clear()

    def wait(self, wanted: Collection[Event], timeout: float) -> dict[Event, float]:
        """When each of these events was seen first. Raises LabError when one was not within `timeout` seconds."""
        until, at, found, left = time.monotonic() + timeout, 0, {}, set(wanted)
        while True:
            for when, event in self.events[at:]:
                if event in left:
                    left.discard(event)
                    found[event] = when
            at = len(self.events)
            if not left:
                return found
            if time.monotonic() > until:
                raise LabError(f"{len(left)} of {len(wanted)} events not seen in {timeout} s: {sorted(left)[:5]}")
            self.look(min(0.5, until - time.monotonic()))

    def wait_count(self, kind: str, count: int, timeout: float) -> float:
        """When the event number `count` of this kind was seen. Raises LabError after `timeout` seconds."""
        until = time.monotonic() + timeout
        while True:
            times = [when for when, event in self.events if event[0] == kind]
            if len(times) >= count:
                return times[count - 1]
            if time.monotonic() > until:
                raise LabError(f"{len(times)} of {count} events {kind} seen in {timeout} s")
            self.look(min(0.5, until - time.monotonic()))

    def _note(self, *event: str) -> None:
        self.events.append((time.monotonic(), event))

    def _take_rt(self) -> None:
        for message in self._rt.notifications():
            self._note(*_described(message))

    def _take_nft(self) -> None:
        for message in self._nft.notifications():
            kind = message.type & 0xFF
            if message.type >> 8 != _NFT_SUBSYSTEM:
                _check_overrun(message)
            elif kind == _NEWGEN:
                self._note("gen")
            elif kind in (_NEWSETELEM, _DELSETELEM):
                raw = bytes(message.payload)
                for address in self.addresses:
                    if ip_address(address).packed in raw:
                        self._note("nft+" if kind == _NEWSETELEM else "nft-", address)
            else:
                self._note("nft", str(kind))

    def _take_flows(self) -> None:
        try:
            data = os.read(self._tty, 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            self._poll.unregister(self._tty)
            self._note("flows ended")
            return
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            found = _EVENT.match(line.decode(errors="replace").rstrip("\r"))
            if not found:
                continue
            how, _, rest = found.groups()
            match, _, actions = rest.rpartition("actions=") if "actions=" in rest else (rest, "", "drop")
            match = ",".join(sorted(match.strip().split(",")))
            if how == "DELETED":
                self.table.pop(match, None)
            else:
                self.table[match] = actions
            self._note({"ADDED": "flow+", "DELETED": "flow-", "MODIFIED": "flow~"}[how], match)

    def _take_database(self) -> None:
        assert self._db is not None
        try:
            data = self._db.recv(1 << 20)
        except BlockingIOError:
            return
        if not data:
            self._poll.unregister(self._db)
            self._note("database ended")
            return
        self._text += data.decode()
        while self._text:
            try:
                message, end = self._decoder.raw_decode(self._text)
            except ValueError:
                return
            self._text = self._text[end:].lstrip()
            self._take_message(message)

    def _take_message(self, message: dict[str, Any]) -> None:
        assert self._db is not None
        if message.get("method") == "echo":
            self._db.sendall(json.dumps({"result": [], "error": None, "id": message["id"]}).encode())
        tables = message["params"][1] if message.get("method") == "update" else message.get("result")
        if not isinstance(tables, dict):
            return
        for uuid, change in tables.get("Interface", {}).items():
            new = change.get("new")
            if new is None:
                name = self._uuids.pop(uuid, change.get("old", {}).get("name", "?"))
                self.ports.pop(name, None)
                self._note("port-", name)
                continue
            number = new["ofport"] if isinstance(new["ofport"], int) else 0
            self._uuids[uuid] = new["name"]
            self.ports[new["name"]] = number
            self._note("port+" if number > 0 else "port?", new["name"])
        for change in tables.get("Open_vSwitch", {}).values():
            new = change["new"]
            self._cfg = (new["next_cfg"], new["cur_cfg"])
            self._note("cfg", str(self._cfg[0]))
            if self._cfg[0] == self._cfg[1]:
                self._note("settled")


_NAMES = {
    rtnetlink.NEWLINK: "link+",
    rtnetlink.DELLINK: "link-",
    rtnetlink.NEWADDR: "addr+",
    rtnetlink.DELADDR: "addr-",
    rtnetlink.NEWNETCONF: "conf+",
    rtnetlink.DELNETCONF: "conf-",
}


def _check_overrun(message: Message) -> None:
    if message.type == netlink_socket.OVERRUN:
        raise LabError("the kernel dropped notifications, so some events were not seen")


def _described(message: Message) -> Event:
    _check_overrun(message)
    if message.type in (rtnetlink.NEWROUTE, rtnetlink.DELROUTE):
        route = parser.parse_route(message.payload)
        sign = "+" if message.type == rtnetlink.NEWROUTE else "-"
        return (f"route{sign}", route.dst) if route else ("route?",)
    if message.type in (rtnetlink.NEWNEIGH, rtnetlink.DELNEIGH):
        found = parser.parse_neighbour(message.payload)
        if found is None:
            return ("neigh?",)
        sign = "-" if message.type == rtnetlink.DELNEIGH else "+"
        if found.family == rtnetlink.AF_BRIDGE:
            return (f"fdb{sign}", found.mac)
        if sign == "+" and not found.state & rtnetlink.PERMANENT:
            return ("neigh~", found.dst)
        return (f"neigh{sign}", found.dst)
    return (_NAMES.get(message.type, f"rt{message.type}"),)
