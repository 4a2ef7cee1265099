"""Observe and change the OVS bridge and its tunnel ports in the Open_vSwitch database.

The managed ports are kept as types.Port and refreshed row by row from the replica, so that a change costs only what
changed.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ovs.db.idl
import ovs.poller
import ovs.timeval

from ovsmesh.dataplane.types import MARK, OBR, Bridge, Port, Unmanaged
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.ovs.idl import Replica, references, run_dir
from ovsmesh.reasons import Reason

_NEVER = float("inf")
COMMIT_DEADLINE = 5.0
"""Seconds for ovsdb-server to answer a transaction: 0.4 s is usual for a thousand ports."""
SWITCH_DEADLINE, SWITCH_DEADLINE_PORT = 1.5, 0.003
"""Seconds for ovs-vswitchd to apply a transaction, and more for each port in it: it needs 0.4 s for a thousand."""
_NUDGES = 3
_BATCH = 1000
"""Ports in one transaction; 5,000 at once were no faster (docs/design.md)."""
_EXTRA = {
    "controller": [],
    "stp_enable": False,
    "rstp_enable": False,
    "mcast_snooping_enable": False,
    "flood_vlans": [],
    "flow_tables": {},
    "protocols": [],
}
"""Columns of obr0 that nobody may set → what they are without. They change how it forwards: a controller flushes the
flows and lets all pass where it can't be reached, STP blocks ports, without OpenFlow 1.0 no flow can be written."""
_COPIES = ("mirrors", "netflow", "sflow", "ipfix", "auto_attach", "other_config")
"""Columns of obr0 that are named where someone has set them, and left: they watch it, or are of another's tools."""
_VLAN: dict[str, Any] = {"tag": [], "trunks": [], "vlan_mode": []}
"""Columns of ports that nobody may set: they keep frames from a port that forwards without flows."""
_NODE, _UID = MARK, f"{MARK}-uid"
"""Keys of a port's external_ids."""


class _Poller:
    """What python-ovs asks of its own poller, which can't be used a second time."""

    def __init__(self) -> None:
        self.poll = select.poll()
        self._events: dict[int, int] = {}
        self.end = _NEVER
        """When something is to be done whatever happens (monotonic seconds)."""

    def fd_wait(self, fd: int | socket.socket, events: int) -> None:
        """Wait for a file descriptor too."""
        number = fd if isinstance(fd, int) else fd.fileno()
        self._events[number] = self._events.get(number, 0) | events
        self.poll.register(number, self._events[number])

    def timer_wait(self, milliseconds: float) -> None:
        """Wait no longer than that."""
        self.end = min(self.end, time.monotonic() + max(0.0, milliseconds) / 1000)

    def timer_wait_until(self, milliseconds: float) -> None:
        """Wait no longer than until then, on python-ovs's clock."""
        self.timer_wait(milliseconds - ovs.timeval.msec())

    def immediate_wake(self) -> None:
        """Do not wait."""
        self.timer_wait(0)


def _vlan(row: Any) -> list[str]:
    """Return the columns of a port's row that put it into a VLAN."""
    return [] if row is None else [column for column in _VLAN if getattr(row, column)]


class OvsObserved(NamedTuple):
    """What the database holds, as fields of Dataplane; unmanaged objects; ports that ovs-vswitchd could not make."""

    bridges: dict[str, Bridge]
    ports: dict[str, Port]
    restore_wait: dict[str, bool]
    unmanaged: list[Unmanaged]
    problems: list[Problem]


class Ovs:
    """One connection to this host's OVS database. Not thread-safe."""

    def __init__(self, remote: str) -> None:
        run_dir(remote)
        self.remote = remote
        self._idl = Replica(remote)
        self._seqno = self._idl.change_seqno
        self._was_synced = False
        self._ports: dict[str, Port] = {}
        self._uuids: dict[str, Any] = {}
        self._port_names: dict[Any, str] = {}
        self._holders: dict[Any, Any] = {}
        """UUID of an interface → UUID of its port."""
        self._members: frozenset[Any] = frozenset()
        """UUIDs of obr0's ports."""
        self.ofports: dict[str, int] = {}
        """Port of obr0 → its OpenFlow number, once ovs-vswitchd has assigned it."""
        self._errors: dict[str, str] = {}
        self._silent_since: int | None = None
        """The configuration (cur_cfg) at which ovs-vswitchd last did not answer in time."""

    def close(self) -> None:
        """Close the connection."""
        self._idl.close()

    def run(self) -> bool:
        """Process what the server sent, and return whether the replica may have changed."""
        self._idl.run()
        # while the server is away, python-ovs counts each attempt to reach it as a change
        changed = self._was_synced != self.synced or (self.synced and self._seqno != self._idl.change_seqno)
        self._seqno, self._was_synced = self._idl.change_seqno, self.synced
        return changed

    def wait(
        self, fds: Sequence[int], timeout: float, look: Callable[[], bool] = lambda: False, every: float = _NEVER
    ) -> None:
        """Sleep until the database sends something, one of `fds` is readable, or `timeout` seconds are over.

        `look` is called in between, `every` so many seconds, and ends the sleep where it returns True.
        """
        poller = _Poller()
        self._idl.wait(poller)
        for fd in fds:
            poller.fd_wait(fd, select.POLLIN)
        end = min(time.monotonic() + timeout, poller.end)
        # most of an agent's life is spent here: no more is done in each round than has to be
        while True:
            rest = max(0.0, end - time.monotonic())
            if poller.poll.poll(min(rest, every) * 1000) or rest <= every or look():
                return

    def connect(self, deadline: float = 3.0) -> bool:
        """Wait up to `deadline` seconds for a complete replica, and return whether there is one."""
        end = time.monotonic() + deadline
        while not self.synced and time.monotonic() < end:
            self.run()
            if not self.synced:
                self.wait((), end - time.monotonic())
        return self.synced

    @property
    def synced(self) -> bool:
        """Return whether the replica is complete and its server is connected."""
        return self._idl.answers and self._root is not None

    @property
    def _root(self) -> Any:
        return next(iter(self._idl.tables["Open_vSwitch"].rows.values()), None)

    def bridge_of(self, link: str) -> str | None:
        """Return the datapath_type of the OVS bridge `link`; None where there is no such bridge."""
        row = self._bridge(link)
        return None if row is None else str(row.datapath_type or "system")

    def ports_of(self, bridge: str) -> list[str]:
        """Return the names of the ports of an OVS bridge; [] where there is no such bridge."""
        row = self._bridge(bridge)
        return [] if row is None else sorted(port.name for port in row.ports)

    def _bridge(self, name: str) -> Any:
        return next((row for row in self._idl.tables["Bridge"].rows.values() if row.name == name), None)

    def others_restore(self) -> bool:
        """Return whether an unmanaged bridge forwards nothing until its owner has restored its flows."""
        rows = self._idl.tables["Bridge"].rows.values()
        return any(row.name != OBR and row.fail_mode == ["secure"] for row in rows)

    def observe(self) -> OvsObserved:
        """Return what the replica holds. Call it only while `synced`."""
        self._refresh()
        waiting = self._root.other_config.get("flow-restore-wait") == "true"
        restore = {"flow-restore-wait": True} if waiting else {}
        row = self._bridge(OBR)
        if row is None:
            return OvsObserved({}, {}, restore, self._in_the_way(OBR), [])
        if row.external_ids.get(MARK) is None:
            text = f"OVS bridge {OBR} is not managed by ovsmesh (no external_ids:{MARK}); rename or delete it"
            return OvsObserved({}, {}, restore, [Unmanaged("bridges", OBR, text)], [])
        local = self._interface(OBR)
        mtu = local.mtu_request[0] if local is not None and local.mtu_request else 0
        fail_mode = row.fail_mode[0] if row.fail_mode else "standalone"
        extra = tuple(column for column in _EXTRA if getattr(row, column))
        extra += tuple(_vlan(self._idl.tables["Port"].rows.get(self._uuids.get(OBR))))
        bridge = Bridge(row.datapath_type or "system", fail_mode, mtu, extra)
        unmanaged = [
            Unmanaged(
                "bridges",
                f"{OBR} {column}",
                f"{column} of OVS bridge {OBR} is set; it stays. What it copies or changes is not the mesh's: "
                f"`ovs-vsctl clear Bridge {OBR} {column}` ends it",
                blocks=False,
            )
            for column in _COPIES
            if getattr(row, column)
        ]
        for uuid in self._members:
            name = self._port_names.get(uuid)
            if name is not None and name not in self._ports and name != OBR:
                text = f"port {name} in {OBR} is not managed by ovsmesh (no external_ids:{MARK}); it stays"
                unmanaged.append(Unmanaged("ports", name, f"{text}, and its frames are dropped"))
        problems = [
            Problem(Reason.PortError, f"ovs-vswitchd says: {text}", self._ports[name].node, "port", name)
            for name, text in self._errors.items()
            if name in self._ports
        ]
        if OBR in self._errors:
            problems.append(Problem(Reason.PortError, f"ovs-vswitchd says: {self._errors[OBR]}", "", "port", OBR))
        return OvsObserved({OBR: bridge}, dict(self._ports), restore, unmanaged, problems)

    def _in_the_way(self, name: str) -> list[Unmanaged]:
        """Return a port of that name in another bridge, which prevents a bridge of that name."""
        if all(row.name != name for row in self._idl.tables["Port"].rows.values()):
            return []
        return [Unmanaged("bridges", name, f"an OVS port called {name} is in another bridge; rename or delete it")]

    def _interface(self, name: str) -> Any:
        port = self._uuids.get(name)
        row = self._idl.tables["Port"].rows.get(port)
        return row.interfaces[0] if row is not None and row.interfaces else None

    def _refresh(self) -> None:
        """Update the ports from the rows that were touched since the last time."""
        touched = self._idl.touched
        if not any(touched.values()):
            return
        ports = self._idl.tables["Port"].rows
        if touched["Bridge"]:
            bridge = self._bridge(OBR)
            members = frozenset() if bridge is None else frozenset(references(bridge, "ports"))
            # python-ovs reports a port's row before or after its membership
            stale = touched["Port"] | (members ^ self._members)
            self._members = members
        else:
            stale = set(touched["Port"])
        stale |= {self._holders[u] for u in touched["Interface"] if u in self._holders}
        for uuid in stale:
            self._refresh_port(uuid, ports.get(uuid))
        for rows in touched.values():
            rows.clear()

    def _refresh_port(self, uuid: Any, row: Any) -> None:
        old = self._port_names.get(uuid)
        if old is not None and self._uuids.get(old) == uuid:
            for known in (self._ports, self._uuids, self.ofports, self._errors):
                known.pop(old, None)
        self._port_names.pop(uuid, None)
        held = [] if row is None else references(row, "interfaces")
        interface = self._idl.tables["Interface"].rows.get(held[0]) if held else None
        if interface is None:
            return
        self._holders[held[0]] = uuid
        name = row.name
        self._port_names[uuid] = name
        self._uuids[name] = uuid
        if uuid not in self._members:
            # OpenFlow numbers are valid within one bridge only
            return
        if interface.ofport and interface.ofport[0] > 0:
            self.ofports[name] = interface.ofport[0]
        if interface.error:
            self._errors[name] = interface.error[0]
        ids = row.external_ids
        if ids.get(_NODE) is None or name == OBR:
            return
        options = dict(interface.options)
        remote, local, key = (options.pop(name, "") for name in ("remote_ip", "local_ip", "key"))
        kind = interface.type
        if options or len(held) != 1:
            # any other option is drift: csum=true loses every packet
            kind += f" with {sorted(options.items())}"
        if vlan := _vlan(row):
            kind += f" with {', '.join(vlan)}"
        self._ports[name] = Port(kind, remote, local, key, ids[_NODE], ids.get(_UID, ""), bool(row.protected))

    def apply(
        self,
        bridge: Bridge | None,
        set_ports: Mapping[str, Port],
        del_ports: Sequence[str] = (),
        del_bridge: bool = False,
        clear_restore_wait: bool = False,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Set the bridge (None: leave it), set and delete ports, and wait until ovs-vswitchd has applied it.

        Needs one transaction for each thousand ports. Calls `meanwhile` once, after the first is sent. Raises
        OvsmeshError when the server or the switch refuses it, or does not apply it in time.
        """
        names = list(set_ports)
        batches = [names[start : start + _BATCH] for start in range(0, len(names), _BATCH)] or [[]]
        for number, batch in enumerate(batches):
            some = {name: set_ports[name] for name in batch}
            txn = self._transaction(
                None if number else bridge, some, () if number else del_ports, del_bridge, clear_restore_wait
            )
            self._commit(txn, some, len(del_ports), meanwhile if not number else lambda: None)

        for _ in range(_NUDGES):
            if not del_ports or not any(name in self._errors for name in names):
                break
            # the switch refuses a port whose remote a just deleted one had; any change makes it try again
            self.nudge(names)

    def nudge(self, names: Iterable[str] = ()) -> None:
        """Make ovs-vswitchd apply its configuration again, and with it what failed before.

        Waits until it has made the ports `names`. Raises OvsmeshError as `apply` does.
        """
        row = self._bridge(OBR)
        if row is None:
            return
        txn = self._transaction(None, {}, (), False, False)
        # a transaction without a change would not count up next_cfg
        mark = row.external_ids.get(MARK, "")
        row.setkey("external_ids", MARK, str(int(mark) + 1) if mark.isdigit() else "1")
        self._commit(txn, dict.fromkeys(names), 0, lambda: None)

    def remake(self) -> None:
        """Have ovs-vswitchd make obr0 and the devices of its ports again, from rows that stay. Its flows are lost.

        It takes the bridge down when datapath_type changes, whatever is left of it, and makes it again when that
        changes back. Raises OvsmeshError as `apply` does.
        """
        row = self._bridge(OBR)
        if row is None:
            return
        kind, ports = row.datapath_type, dict.fromkeys(self._ports)
        for number, each in enumerate(("system" if kind == "netdev" else "netdev", kind)):
            row = self._bridge(OBR)
            if row is None:
                # deleted by someone meanwhile: the next look at the bridge says so
                return
            txn = self._transaction(None, {}, (), False, False)
            row.datapath_type = each
            self._commit(txn, ports if number else {}, len(ports), lambda: None)

    @property
    def errors(self) -> Mapping[str, str]:
        """Return the ports that ovs-vswitchd could not make, with what it says."""
        return self._errors

    def _transaction(
        self,
        bridge: Bridge | None,
        set_ports: Mapping[str, Port],
        del_ports: Sequence[str],
        del_bridge: bool,
        clear_restore_wait: bool,
    ) -> Any:
        if not self.synced:
            raise OvsmeshError(f"no connection to ovsdb-server at {self.remote}; is it running?")
        txn = ovs.db.idl.Transaction(self._idl)
        txn.add_comment(MARK)
        root = self._root
        row = self._bridge(OBR)
        if bridge is not None:
            row = self._set_bridge(txn, root, row, bridge)
        for name in del_ports:
            port = self._idl.tables["Port"].rows.get(self._uuids.get(name))
            if port is not None and row is not None:
                row.delvalue("ports", port)
        for name, want in set_ports.items():
            self._set_port(txn, row, name, want)
        if del_bridge and row is not None:
            root.delvalue("bridges", row)
        if clear_restore_wait:
            root.delkey("other_config", "flow-restore-wait")
        root.increment("next_cfg")
        return txn

    def _set_bridge(self, txn: Any, root: Any, row: Any, want: Bridge) -> Any:
        if row is None:
            row = txn.insert(self._idl.tables["Bridge"])
            row.name = OBR
            row.external_ids = {MARK: "1"}
            port, interface = self._insert_port(txn, OBR)
            interface.type = "internal"
            row.ports = [port]
            root.addvalue("bridges", row)
        else:
            interface = self._interface(OBR)
        row.datapath_type = want.datapath_type
        row.fail_mode = [want.fail_mode]
        for column, value in _EXTRA.items():
            setattr(row, column, value)
        own = self._idl.tables["Port"].rows.get(self._uuids.get(OBR))
        for column, value in _VLAN.items() if own is not None else ():
            setattr(own, column, value)
        if interface is not None:
            interface.mtu_request = [want.mtu_request]
        return row

    def _insert_port(self, txn: Any, name: str) -> tuple[Any, Any]:
        """Insert a port with its interface; both have the one name."""
        port, interface = txn.insert(self._idl.tables["Port"]), txn.insert(self._idl.tables["Interface"])
        port.name = interface.name = name
        port.interfaces = [interface]
        return port, interface

    def _set_port(self, txn: Any, bridge: Any, name: str, want: Port) -> None:
        row = self._idl.tables["Port"].rows.get(self._uuids.get(name))
        if row is None:
            row, interface = self._insert_port(txn, name)
            bridge.addvalue("ports", row)
        else:
            interface = row.interfaces[0]
            for column, value in _VLAN.items():
                setattr(row, column, value)
        # split horizon, in the same transaction as the port: a broadcast would loop between two
        row.protected = want.protected
        row.external_ids = {_NODE: want.node, _UID: want.uid} if want.uid else {_NODE: want.node}
        interface.type = want.type
        options = {"remote_ip": want.remote, "local_ip": want.local}
        interface.options = options | {"key": want.key} if want.key else options

    def _commit(self, txn: Any, set_ports: Mapping[str, Any], gone: int, meanwhile: Callable[[], None]) -> None:
        try:
            status = txn.commit()
            meanwhile()
            end = time.monotonic() + COMMIT_DEADLINE
            while status == txn.INCOMPLETE:
                if time.monotonic() > end:
                    raise OvsmeshError(f"ovsdb-server at {self.remote} did not commit in {COMMIT_DEADLINE} s")
                poller = ovs.poller.Poller()
                self._idl.wait(poller)
                txn.wait(poller)
                poller.timer_wait(max(1, int((end - time.monotonic()) * 1000)))
                poller.block()
                self._idl.run()
                status = txn.commit()
            if status not in (txn.SUCCESS, txn.UNCHANGED):
                detail = txn.get_error() or txn.status_to_string(status)
                raise OvsmeshError(f"ovsdb-server at {self.remote} refused a transaction: {detail}")
            target = txn.get_increment_new_value() if status == txn.SUCCESS else None
        finally:
            txn.abort()
        if target is not None:
            self._await_switch(target, set_ports, gone)

    def _await_switch(self, target: int, ports: Mapping[str, Any], gone: int) -> None:
        """Wait until ovs-vswitchd has applied configuration `target`, numbered `ports` and closed `gone` others.

        Waits only shortly where it did not answer the last time and has not since: a dead switch must not delay the
        kernel's part.
        """
        root = self._root
        silent = self._silent_since is not None and root is not None and root.cur_cfg == self._silent_since
        end = time.monotonic() + (0.2 if silent else SWITCH_DEADLINE + SWITCH_DEADLINE_PORT * (len(ports) + gone))
        applied = False
        while time.monotonic() < end:
            self._idl.run()
            root = self._root
            applied = root is not None and root.cur_cfg >= target
            if applied:
                self._silent_since = None
                self._refresh()
                if all(name in self.ofports or name in self._errors for name in ports):
                    return
            self.wait((), min(1.0, end - time.monotonic()))
        if applied:
            some = next(name for name in ports if name not in self.ofports and name not in self._errors)
            kind = self.bridge_of(OBR)
            raise OvsmeshError(f"ovs-vswitchd could not make port {some} in {OBR} (datapath {kind}); its log says why")
        self._silent_since = root.cur_cfg if root is not None else -1
        raise OvsmeshError("ovs-vswitchd does not apply its configuration; is it running? Its log says more")
