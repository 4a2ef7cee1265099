"""Write the steps of a plan as lines, and many of them in one sentence: what `plan`, the log and the history show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ovsmesh.dataplane import cni_config
from ovsmesh.dataplane.types import MARK, Bridge, Link, Port, Route
from ovsmesh.text import listed

if TYPE_CHECKING:
    from ovsmesh.dataplane.plan import Step

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
_PLURALS = {
    "addresses": "addresses",
    "filter_peers": "filter peers",
    "fdb": "FDB entries",
    "docker": "settings of Docker",
    "cni": "CNI files",
}
"""Kind → how several parts of it are called, where that is not the name with an s."""
_SINGLE = {"addresses": "dev", "neighbours": "lladdr", "fdb": "dev", "filter_peers": "in"}
"""Kinds whose values are one field → its name."""
_DEFAULTS = {"state": "up", "flooding": "off", "protected": "yes", "alias": MARK, "devices": "present"}
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
            pairs += [("set", ", ".join(value.extra)), ("devices", "missing" if value.devices_lost else "")]
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


# Many steps in one sentence

_LONG = ("rules", "flows")
"""Kinds whose names are too long for a list in a sentence."""


def unnamed(steps: Iterable[Step], most: int = 3) -> Iterator[str]:
    """Yield what each step is about, such as "+ route 10.97.2.0/24"; nothing where a sentence names them all.

    Flows come last: their names are the longest, and they follow from the ports.
    """
    every = list(steps)
    if all(number <= (1 if kind in _LONG else most) for kind, number in Counter(s.kind for s in every).items()):
        return
    for last in (False, True):
        yield from (f"{step.op} {name(step.kind, step.key)}" for step in every if (step.kind == "flows") is last)


def summary(steps: Iterable[Step], most: int = 3) -> str:
    """Return what steps are about in one line: "link kbr0, 3 neighbours (…) and 4 routes (…)".

    Of each kind at most `most` are named.
    """
    kinds: dict[str, list[Any]] = {}
    for step in steps:
        kinds.setdefault(step.kind, []).append(step.key)
    found = []
    for kind, every in kinds.items():
        if len(every) == 1:
            found.append(name(kind, every[0]))
            continue
        single = _NAMES[kind]
        # the rest is only counted
        keys = [*(name(kind, key).removeprefix(f"{single} ") for key in every[:most]), *every[most:]]
        more = "" if kind in _LONG else f" ({listed(keys, most)})"
        found.append(f"{len(every)} {_PLURALS.get(kind, f'{single}s')}{more}")
    return " and ".join(filter(None, (", ".join(found[:-1]), *found[-1:])))


_DONE = {"+": "added", "~": "changed", "-": "removed"}
_DRIFTED = {"+": "deleted", "~": "changed", "-": "added"}
"""What a step repairs."""


def changes(steps: Sequence[Step], most: int = 3) -> str:
    """Return what was done: "added port gre-web2 and 3 flows (…); removed route 10.97.4.0/24"."""
    groups = ((_DONE[op], [step for step in steps if step.op == op]) for op in _DONE)
    return "; ".join(f"{done} {summary(group, most)}" for done, group in groups if group)


def drift(steps: Sequence[Step], who: str, most: int = 3) -> Iterator[tuple[str, Sequence[Step]]]:
    """Yield what had happened to the parts that steps repair, as in "route 10.97.2.0/24 was deleted by someone".

    With each sentence come the steps that it is about.
    """
    for op, done in _DRIFTED.items():
        group = [step for step in steps if step.op == op and step.kind != "restore_wait"]
        if group:
            were = "was" if len(group) == 1 else "were"
            yield f"{summary(group, most)} {were} {done} by {who}{_difference(group)}", group
    if all(step.kind == "restore_wait" for step in steps):
        yield f"flow-restore-wait was set by {who}", steps


def _difference(steps: Sequence[Step]) -> str:
    """Return how the part of a single step differs from what is wanted, as in " (mtu 1400, not 1462)"."""
    step = steps[0]
    if len(steps) > 1 or step.op != "~" or step.kind in ("rules", "flows", "cni"):
        return ""
    if step.kind == "sysctls":
        return f" ({step.have if step.have is not None else 'absent'}, not {step.want})"
    found = dict(_fields(step.kind, step.have))
    pairs = [(field, found[field], value) for field, value in _fields(step.kind, step.want) if found[field] != value]
    other = [
        f"{field} {have or _DEFAULTS.get(field, 'none')}, not {want or _DEFAULTS.get(field, 'none')}".lstrip()
        for field, have, want in pairs
    ]
    return f" ({'; '.join(other)})" if other else ""
