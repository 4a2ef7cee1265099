"""Write the steps of a plan as lines: what `ovsmesh plan`, the log and the golden tests show."""

from __future__ import annotations

from typing import Any

from ovsmesh.dataplane import cni_config
from ovsmesh.dataplane.types import MARK, Bridge, Link, Port, Route

_NAMES = {
    "bridges": "bridge",
    "links": "link",
    "sysctls": "sysctl",
    "addresses": "address",
    "rules": "rule",
    "filter_peers": "filter-peer",
    "ports": "port",
    "flows": "flow",
    "neighbours": "neighbour",
    "fdb": "fdb",
    "routes": "route",
    "restore_wait": "ovs",
    "docker": "docker",
    "cni": "cni",
}
"""Kind (field of Dataplane) → how one part of it is called."""
_SINGLE = {"addresses": "dev", "neighbours": "lladdr", "fdb": "dev", "filter_peers": "in"}
"""Kinds whose values are one field → its name."""
_DEFAULTS = {"state": "up", "flooding": "off", "protected": "yes", "alias": MARK}
"""Defaults are left out of a step's text; where one is restored, this is what it is called."""


def name(kind: str, key: Any) -> str:
    """Return what a part is called, such as "route 10.97.2.0/24"."""
    if kind == "routes":
        key = key[0]
    elif kind == "rules":
        key = " ".join(key)
    elif kind == "flows":
        priority, _, match = key.partition(" ")
        key = f"priority={priority},{match}" if match else f"priority={priority}"
    return f"{_NAMES[kind]} {key}"


def _fields(kind: str, value: Any) -> list[tuple[str, str]]:
    """Return a value's fields, as name and text, in the order in which a reader expects them."""
    if kind == "cni":
        return cni_config.summary(value)
    match value:
        case Port():
            pairs: list[tuple[str, Any]] = [("remote", value.remote), ("local", value.local), ("key", value.key)]
            pairs += [("type", value.type), ("node", value.node), ("uid", value.uid)]
            pairs += [("protected", "" if value.protected else "no")]
        case Link():
            pairs = [("mtu", value.mtu), ("mac", value.mac), ("master", value.master), ("kind", value.kind)]
            pairs += [("state", "" if value.up else "down")]
            pairs += [("flooding", "" if value.quiet or not value.master else "on")]
            pairs += [("alias", "none" if value.unmarked else "")]
        case Bridge():
            pairs = [("datapath", value.datapath_type), ("fail-mode", value.fail_mode), ("mtu", value.mtu_request)]
        case Route():
            pairs = [("type", "" if value.type == "unicast" else value.type), ("via", value.via)]
            pairs += [("dev", value.dev), ("mtu", value.mtu or "")]
        case _:
            pairs = [(_SINGLE.get(kind, ""), value)]
    return [(field, str(text)) for field, text in pairs]


def subject(op: str, kind: str, key: Any, want: Any, have: Any) -> str:
    """Return what a step changes: a part's name, and what it has, is to have, or both."""
    text = name(kind, key)
    if kind == "sysctls":
        return f"{text} {have if have is not None else '(absent)'} → {want}"
    if op == "-":
        return text
    if kind == "rules":
        return f"{text}: {want.text}"
    if kind == "flows":
        return f"{text} → {want}"
    wanted = _fields(kind, want)
    if op == "+":
        shown = wanted[:1] if kind == "ports" else wanted
        return " ".join([text, *(f"{field} {value}".lstrip() for field, value in shown if value)])
    found = dict(_fields(kind, have))
    changes = [
        f"{field} {found[field] or _DEFAULTS.get(field, 'none')} → {value or _DEFAULTS.get(field, 'none')}".lstrip()
        for field, value in wanted
        if found[field] != value
    ]
    return f"{text} {', '.join(changes) or 'text differs'}"
