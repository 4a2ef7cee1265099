"""Keep a replica of the needed part of the Open_vSwitch database, through python-ovs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ovs.db.idl
import ovs.vlog

from ovsmesh.errors import OvsmeshError
from ovsmesh.ovs import json_parser

_PROBE_MS = 5000
"""Without a word of the server for so long it is asked for one, and as long again later it counts as away."""
_BACKOFF_MS = (100, 500)
"""Between attempts to reach the server again: it is on this host, and ovs-vswitchd waits for its flows."""

_STRINGS = {"key": "string", "value": "string", "min": 0, "max": "unlimited"}
_OPTIONAL = {"key": "string", "min": 0, "max": 1}
_OPTIONAL_INT = {"key": "integer", "min": 0, "max": 1}
_ANY_OF = {"key": "uuid", "min": 0, "max": "unlimited"}
"""Rows of a table that is not in the replica."""


def _refs(table: str) -> dict[str, Any]:
    return {"key": {"type": "uuid", "refTable": table}, "min": 0, "max": "unlimited"}


SCHEMA: dict[str, dict[str, Any]] = {
    "Open_vSwitch": {
        "bridges": _refs("Bridge"),
        "next_cfg": "integer",
        "cur_cfg": "integer",
        "other_config": _STRINGS,
    },
    "Bridge": {
        "name": "string",
        "ports": _refs("Port"),
        "datapath_type": "string",
        "fail_mode": _OPTIONAL,
        "controller": _ANY_OF,
        "stp_enable": "boolean",
        "rstp_enable": "boolean",
        "mcast_snooping_enable": "boolean",
        "flood_vlans": {"key": "integer", "min": 0, "max": 4096},
        "flow_tables": {"key": "integer", "value": "uuid", "min": 0, "max": "unlimited"},
        "protocols": {"key": "string", "min": 0, "max": "unlimited"},
        "mirrors": _ANY_OF,
        "netflow": _ANY_OF,
        "sflow": _ANY_OF,
        "ipfix": _ANY_OF,
        "auto_attach": _ANY_OF,
        "other_config": _STRINGS,
        "external_ids": _STRINGS,
    },
    "Port": {
        "name": "string",
        "interfaces": _refs("Interface"),
        "protected": "boolean",
        "tag": _OPTIONAL_INT,
        "trunks": {"key": "integer", "min": 0, "max": 4096},
        "vlan_mode": _OPTIONAL,
        "external_ids": _STRINGS,
    },
    "Interface": {
        "name": "string",
        "type": "string",
        "options": _STRINGS,
        "ofport": _OPTIONAL_INT,
        "error": _OPTIONAL,
        "mtu_request": _OPTIONAL_INT,
    },
}
"""The replica's columns, typed as in vswitch.ovsschema since OVS 2.6, so that no schema file is needed."""


def run_dir(remote: str) -> Path:
    """Return where ovs-vswitchd keeps its management sockets: beside the database's.

    Raises OvsmeshError for a remote that is not a UNIX socket: the agent works on its own host only.
    """
    kind, _, path = remote.partition(":")
    if kind != "unix" or not path.startswith("/"):
        raise OvsmeshError(f"--ovsdb {remote}: wanted unix:/PATH of this host's ovsdb-server socket")
    return Path(path).parent


class Replica(ovs.db.idl.Idl):  # type: ignore[misc]  # python-ovs has no types
    """python-ovs's replica, which also keeps the UUIDs of the rows that were touched, by table."""

    def __init__(self, remote: str) -> None:
        _prepare()
        self.touched: dict[str, set[Any]] = {table: set() for table in SCHEMA}
        super().__init__(remote, _helper(SCHEMA))
        machine = self._session.reconnect
        # python-ovs does not probe a UNIX socket, as its end is noticed at once; but a server may hang
        machine.set_probe_interval(_PROBE_MS)
        # the setter allows no less than a second
        machine.min_backoff, machine.max_backoff = _BACKOFF_MS

    def notify(self, event: str, row: Any, updates: Any = None) -> None:
        """Remember that a row was touched."""
        self.touched[row._table.name].add(row.uuid)

    @property
    def answers(self) -> bool:
        """Return whether the replica is complete and its server is connected, and has answered on this connection.

        The kernel takes connections for a server that hangs.
        """
        known = self.has_ever_connected() and self._session.is_connected()
        return bool(known and self.state == self.IDL_S_MONITORING)


def references(row: Any, column: str) -> list[Any]:
    """Return the UUIDs in a column. Access through python-ovs would build and sort a thousand rows for it."""
    return [atom.value for atom in row._data[column].values]


def _helper(tables: dict[str, dict[str, Any]]) -> Any:
    typed = {t: {"columns": {c: {"type": k} for c, k in columns.items()}} for t, columns in tables.items()}
    helper = ovs.db.idl.SchemaHelper(schema_json={"name": "Open_vSwitch", "version": "7.0.0", "tables": typed})
    for table, columns in tables.items():
        helper.register_columns(table, list(columns))
    return helper


def _prepare() -> None:
    json_parser.install()
    ovs.vlog.Vlog.init()
    # python-ovs logs through these loggers of the standard library; a lost connection is reported as a problem instead
    for facility in ("console", "syslog", "file"):
        logging.getLogger(facility).propagate = False
        ovs.vlog.Vlog.set_level("any", facility, "off")
