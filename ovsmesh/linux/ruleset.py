"""Find out what in the packet filter of this host drops the mesh's packets: tables of others, read and evaluated.

A rule is evaluated for a kind of packets, such as all new TCP connections from this node's pods to a peer's. What
holds for a part of them only (ports, single addresses) counts as not there; where it can't be told whether a rule
accepts them, nothing is said. FORWARD of iptables is firewall's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from fnmatch import fnmatchcase
from ipaddress import ip_address, ip_network, summarize_address_range
from typing import Any, NamedTuple

from ovsmesh.bounded import output
from ovsmesh.dataplane.types import KBR, MARK, OBR, FilterFound
from ovsmesh.errors import Problem
from ovsmesh.linux.nft_trace import rule_text
from ovsmesh.mesh.types import IPAddress, IPNetwork, within
from ovsmesh.reasons import Reason
from ovsmesh.text import listed, printable

_PROTOCOLS = ("tcp", "udp", "icmp")
_NUMBERS = {1: "icmp", 6: "tcp", 17: "udp", 47: "gre", 58: "icmpv6", "ipv6-icmp": "icmpv6"}
"""Protocols by number, or by another of their names."""
_DEPTH, _STEPS = 16, 24_000
"""Chains in each other (the kernel allows 16 jumps), and rules that are evaluated in one look: half a second's work.
Where there are more, fewer peers stand for all, and what is left then counts as unknown."""
_FAMILIES = {4: ("inet", "ip", "bridge", "netdev"), 6: ("inet", "ip6", "bridge", "netdev")}
_LONGEST = 160


class _Hit(Enum):
    """Whether a rule matches a kind of packets."""

    ALL = auto()
    NONE = auto()
    SOME = auto()
    UNKNOWN = auto()


_ALL, _NONE, _SOME, _UNKNOWN = _Hit


class Kind(NamedTuple):
    """A kind of packets: every new connection of a protocol between two ranges."""

    protocol: str
    source: IPNetwork
    target: IPNetwork
    established: bool = False
    """It is of a connection that conntrack knows."""
    port: int = 0
    """Of the target, 0 for any."""


class Closed(NamedTuple):
    """A rule or policy of an nft table that drops all packets of a kind."""

    family: str
    table: str
    base: str
    """The base chain from which it is reached."""
    hook: str
    chain: str
    handle: int
    """The rule's, 0 for the policy."""

    def __str__(self) -> str:
        where = f"table {self.family} {printable(self.table)}"
        if not self.handle:
            return f"policy drop of chain {printable(self.chain)}, {where}"
        text = rule_text(self.family, self.table, self.chain, self.handle) or f"rule {self.handle}"
        return f"`{printable(text, _LONGEST)}` in chain {printable(self.chain)}, {where}"


@dataclass
class _Chain:
    rules: list[tuple[int, list[Any]]] = field(default_factory=list)
    """Handle and expressions."""
    hook: str = ""
    policy: str = "accept"
    device: str = ""
    type: str = ""


@dataclass
class _Table:
    chains: dict[str, _Chain] = field(default_factory=dict)
    sets: dict[str, list[Any]] = field(default_factory=dict)


class Ruleset:
    """Tables of others, as `nft -a -j list` prints them, each of `texts` on its own: malformed ones hold no tables."""

    def __init__(self, *texts: str) -> None:
        self.tables: dict[tuple[str, str], _Table] = {}
        self.left = _STEPS
        """Rules that may still be evaluated."""
        for text in texts:
            before = dict(self.tables)
            try:
                for item in json.loads(text or "{}").get("nftables", []):
                    self._take(item)
            except (ValueError, AttributeError, TypeError, KeyError):
                self.tables = before

    def _take(self, item: Mapping[str, Any]) -> None:
        for kind, value in item.items():
            if kind not in ("chain", "rule", "set", "map") or str(value["table"]).startswith(MARK):
                continue
            table = self.tables.setdefault((value["family"], value["table"]), _Table())
            if kind == "chain":
                chain = table.chains.setdefault(value["name"], _Chain())
                chain.hook, chain.policy = value.get("hook", ""), value.get("policy", "accept")
                chain.type, device = value.get("type", ""), value.get("dev", "")
                chain.device = device if isinstance(device, str) else " ".join(map(str, device))
            elif kind == "rule":
                table.chains.setdefault(value["chain"], _Chain()).rules.append((value["handle"], value["expr"]))
            else:
                table.sets[value["name"]] = value.get("elem", [])

    def closed(self, kind: Kind, hooks: Collection[str], near: str, far: str = "") -> Iterator[Closed]:
        """Yield what drops all packets of a kind at these hooks. `near` is the link they come from, `far` the other."""
        version = kind.source.version
        for (family, name), table in self.tables.items():
            if family not in _FAMILIES[version]:
                continue
            # in a bridge, packets that are routed go up to kbr0 itself, and down again
            here = (set(hooks) | {"input", "output"}) - {"forward"} if family == "bridge" and far else set(hooks)
            for chain_name, chain in table.chains.items():
                # what iptables keeps there is read by iptables
                if chain.type != "filter" or chain.hook not in here or (name, chain_name) == ("filter", "FORWARD"):
                    continue
                links = _links(family, chain, near, far)
                if links is None:
                    continue
                walk = _Walk(table, _fields(kind, *links), self.left)
                verdict, where, handle = walk.chain(chain_name, 0)
                self.left = walk.left
                if verdict == "drop":
                    yield Closed(family, name, chain_name, chain.hook, where, handle)
                elif verdict in ("end", "return") and chain.policy == "drop":
                    yield Closed(family, name, chain_name, chain.hook, chain_name, 0)

    def base(self, family: str, table: str, chain: str) -> tuple[str, str]:
        """Return the base chain from which a chain is reached, and its hook; "" where none is known."""
        chains = self.tables.get((family, table), _Table()).chains
        bases = [(name, one.hook) for name, one in chains.items() if one.hook]
        for name, hook in bases:
            seen, todo = {name}, [name]
            while todo:
                rules = chains[todo.pop()].rules
                fresh = {t for _, e in rules for t in _targets(e) if t in chains} - seen
                seen |= fresh
                todo += fresh
            if chain in seen:
                return name, hook
        return "", ""


def _targets(expression: Any) -> Iterator[str]:
    """Yield the chains that a rule may go to."""
    if isinstance(expression, dict):
        if isinstance(expression.get("target"), str):
            yield expression["target"]
        expression = list(expression.values())
    if isinstance(expression, list):
        for one in expression:
            yield from _targets(one)


def _links(family: str, chain: _Chain, near: str, far: str) -> tuple[str, str] | None:
    """Return the links that a rule sees packets come in and go out by; None where none of them passes the chain."""
    if family == "netdev":
        return (chain.device, "") if {KBR, OBR} & set(chain.device.split()) else None
    if family == "bridge":
        # packets of the mesh are routed: they enter kbr0 by obr0, or leave by it
        return {"prerouting": (OBR, ""), "input": (OBR, ""), "output": ("", OBR), "postrouting": ("", OBR)}.get(
            chain.hook
        )
    return {"prerouting": (near, ""), "input": (near, ""), "postrouting": ("", far)}.get(chain.hook, (near, far))


def _fields(kind: Kind, near: str, far: str) -> dict[str, Any]:
    """Return what a rule may ask about packets of a kind."""
    four = kind.source.version == 4
    ip = "ip" if four else "ip6"
    protocol = kind.protocol if four or kind.protocol != "icmp" else "icmpv6"
    found: dict[str, Any] = {
        "meta iifname": near,
        "meta iif": near,
        "meta oifname": far,
        "meta oif": far,
        "meta l4proto": protocol,
        "meta nfproto": "ipv4" if four else "ipv6",
        "meta protocol": ip,
        "ether type": ip,
        "ct state": "established" if kind.established else "new",
        "ct status": "confirmed" if kind.established else "",
        f"{ip} saddr": kind.source,
        f"{ip} daddr": kind.target,
        "ip protocol" if four else "ip6 nexthdr": protocol,
    }
    if kind.port:
        found["udp dport"] = found["th dport"] = str(kind.port)
    if protocol in ("icmp", "icmpv6"):
        found[f"{protocol} type"] = "echo-request"
    return found


class _Walk:
    """The way of one kind of packets through the chains of a table."""

    def __init__(self, table: _Table, fields: Mapping[str, Any], left: int) -> None:
        self._table, self._fields, self.left = table, fields, left

    def chain(self, name: str, depth: int) -> tuple[str, str, int]:
        """Return "accept", "drop", "end", "return" or "unknown", and the chain and the rule that say so."""
        chain = self._table.chains.get(name)
        if chain is None or depth > _DEPTH:
            return "unknown", name, 0
        for handle, expressions in chain.rules:
            self.left -= 1
            if self.left < 0:
                return "unknown", name, handle
            found = self._rule(expressions, depth)
            if found is None:
                continue
            verdict, where, which = found
            return verdict, where or name, which or handle
        return "end", name, 0

    def _rule(self, expressions: Iterable[Any], depth: int) -> tuple[str, str, int] | None:
        """Return what a rule does to the packets; None where they go on to the next."""
        hit = _ALL
        for expression in expressions:
            kind: str = next(iter(expression)) if isinstance(expression, dict) else str(expression)
            value: Any = expression[kind] if isinstance(expression, dict) else None
            if kind == "match":
                hit = _both(hit, self._match(value))
            elif kind in ("limit", "quota", "ct count", "xt", "connlimit"):
                hit = _both(hit, _UNKNOWN)
            elif kind == "vmap":
                return self._mapped(hit, value, depth)
            elif kind in _VERDICTS:
                return self._verdict(hit, kind, value, depth)
            if hit is _NONE:
                return None
        return None

    def _verdict(self, hit: _Hit, kind: str, value: Any, depth: int) -> tuple[str, str, int] | None:
        if hit in (_NONE, _SOME) or kind == "continue":
            return None
        refuses = kind in ("drop", "reject")
        if hit is _UNKNOWN:
            return None if refuses else ("unknown", "", 0)
        if kind not in ("jump", "goto"):
            return ("drop" if refuses else kind if kind in ("accept", "return") else "unknown"), "", 0
        found = self.chain(value["target"], depth + 1)
        if found[0] in ("end", "return"):
            return None if kind == "jump" else ("end", "", 0)
        return found

    def _mapped(self, hit: _Hit, value: Mapping[str, Any], depth: int) -> tuple[str, str, int] | None:
        for key, verdict in self._elements(value["data"]):
            one = _both(hit, self._equal(value["key"], key))
            ((kind, inner),) = verdict.items()
            found = self._verdict(one, kind, inner, depth)
            if found is not None or one is _ALL:
                return found
        return None

    def _match(self, match: Mapping[str, Any]) -> _Hit:
        op, right = match["op"], match["right"]
        values = right if op == "in" and isinstance(right, list) else [right]
        found = _any(self._equal(match["left"], value) for value in values)
        if op in ("==", "in"):
            return found
        if op == "!=":
            return {_ALL: _NONE, _NONE: _ALL}.get(found, found)
        return _SOME if found is _SOME else _UNKNOWN

    def _equal(self, left: Any, right: Any) -> _Hit:
        if isinstance(right, str) and right.startswith("@"):
            right = {"set": self._table.sets.get(right[1:], [])}
        if isinstance(right, dict) and "elem" in right:
            right = right["elem"].get("val")
        if isinstance(right, dict) and "set" in right:
            return _any(self._equal(left, one) for one in right["set"])
        if isinstance(left, dict) and "concat" in left:
            parts = right.get("concat", []) if isinstance(right, dict) else []
            hit = _ALL
            for one, other in zip(left["concat"], parts, strict=False):
                hit = _both(hit, self._equal(one, other))
            return hit if parts else _UNKNOWN
        return self._field(left, right)

    def _elements(self, data: Any) -> Iterable[tuple[Any, Any]]:
        if isinstance(data, str):
            return [tuple(pair) for pair in self._table.sets.get(data[1:], [])]
        return [tuple(pair) for pair in data["set"]]

    def _field(self, left: Any, right: Any) -> _Hit:
        ((kind, what),) = left.items() if isinstance(left, dict) else (("", None),)
        if kind == "payload" and isinstance(what, dict) and "protocol" in what:
            protocol, name = what["protocol"], f"{what['protocol']} {what['field']}"
            if name in self._fields:
                return _compare(self._fields[name], right)
            if protocol in ("tcp", "udp", "th", "sctp", "dccp", "udplite"):
                mine = self._fields["meta l4proto"]
                return _SOME if mine == protocol or (protocol == "th" and mine in ("tcp", "udp")) else _NONE
            if protocol in ("ip", "ip6", "icmp", "icmpv6", "arp") and name not in self._fields:
                there = any(known.startswith(f"{protocol} ") for known in self._fields)
                return _SOME if there else _NONE
        elif kind in ("meta", "ct") and isinstance(what, dict):
            name = f"{kind} {what.get('key')}"
        else:
            return _UNKNOWN
        if name not in self._fields:
            return _UNKNOWN
        return _compare(self._fields[name], right)


_VERDICTS = (
    "accept",
    "drop",
    "reject",
    "return",
    "continue",
    "jump",
    "goto",
    "queue",
    "tproxy",
    "synproxy",
    "dup",
    "fwd",
)


def _both(one: _Hit, other: _Hit) -> _Hit:
    for hit in (_NONE, _SOME, _UNKNOWN):
        if hit in (one, other):
            return hit
    return _ALL


def _any(hits: Iterable[_Hit]) -> _Hit:
    found = set(hits)
    return next((hit for hit in (_ALL, _UNKNOWN, _SOME) if hit in found), _NONE)


def _compare(mine: Any, right: Any) -> _Hit:
    if isinstance(mine, str):
        if isinstance(right, list):
            return _any(_compare(mine, one) for one in right)
        if not isinstance(right, (str, int)):
            return _UNKNOWN
        wanted = str(_NUMBERS.get(right, right))
        return _ALL if fnmatchcase(mine, wanted.replace("[", "[[]")) else _NONE
    return _range(mine, right)


def _range(mine: IPNetwork, right: Any) -> _Hit:
    """Compare a range of packets' addresses with an address, a prefix or a range."""
    try:
        if isinstance(right, str):
            others: list[Any] = [ip_network(right, strict=False)]
        elif "prefix" in right:
            others = [ip_network(f"{right['prefix']['addr']}/{right['prefix']['len']}", strict=False)]
        else:
            first, last = map(ip_address, right["range"])
            others = list(summarize_address_range(first, last))
    except (ValueError, KeyError, TypeError):
        return _UNKNOWN
    if any(within(mine, one) for one in others):
        return _ALL
    return _SOME if any(one.overlaps(mine) for one in others) else _NONE


class Query(NamedTuple):
    """Whose packets must pass this host's filter."""

    own: tuple[IPNetwork, ...]
    """This node's ranges."""
    peers: tuple[tuple[str, IPAddress, tuple[IPNetwork, ...]], ...]
    """Name, tunnel address and ranges."""
    ranges: tuple[IPNetwork, ...]
    """The mesh's."""
    tunnel: tuple[str, int, str, IPAddress] | None
    """Protocol, UDP port, link and address of tunnel packets that this kernel takes in; None where a switch does."""


def refusals(query: Query, ruleset: Ruleset) -> tuple[Problem, ...]:
    """Return a problem for each rule or policy of others that drops packets of the mesh, with what opens it."""
    lost: dict[tuple[Closed, str], tuple[dict[str, None], dict[str, None]]] = {}
    rules = sum(len(chain.rules) for table in ruleset.tables.values() for chain in table.chains.values())
    sample = max(1, min(_SAMPLE, _STEPS // (12 * rules or 1)))
    query = query._replace(peers=query.peers[:sample])
    for peer, kind, what, hooks, near in _kinds(query):
        for closed in ruleset.closed(kind, hooks, near, "" if what == _TUNNEL else KBR):
            kinds, peers = lost.setdefault((closed, what), ({}, {}))
            kinds[kind.protocol], peers[peer] = None, None
    found = []
    for (closed, what), (kinds, peers) in lost.items():
        if what == _TUNNEL and len(peers) < len(query.peers):
            continue
        whose = f"{what} {listed(peers, 3)}"
        if what == _PODS and len(kinds) < len(_PROTOCOLS):
            passing = [name.upper() for name in _PROTOCOLS if name not in kinds]
            lost_kinds = " and ".join(name.upper() for name in kinds)
            whose = f"{lost_kinds} packets {whose} ({' and '.join(passing)} passes)"
        else:
            whose = f"all packets {whose}" if what == _PODS else whose
        text = f"{whose} are dropped by {closed}. An accept elsewhere does not lift that"
        found.append(Problem(Reason.PacketsRefused, f"{text}; let them through: {opening(closed, query)}"))
    return tuple(found)


_PODS, _TUNNEL = "between pods here and those of", "tunnel packets from"
_SAMPLE = 20
"""Peers for which the rules are evaluated: they are alike, but for rules about single ranges."""


def _kinds(query: Query) -> Iterator[tuple[str, Kind, str, tuple[str, ...], str]]:
    """Yield what packets must pass: the peer, the kind, which packets they are, at which hooks, from which link."""
    routed = ("prerouting", "forward", "postrouting", "ingress")
    for name, address, cidrs in query.peers:
        for own in query.own:
            for theirs in cidrs:
                if own.version == theirs.version:
                    for one, other in ((own, theirs), (theirs, own)):
                        for protocol in _PROTOCOLS:
                            yield name, Kind(protocol, one, other), _PODS, routed, KBR
        if query.tunnel and query.tunnel[3].version == address.version:
            protocol, port, link, mine = query.tunnel
            # both ends send, so conntrack knows GRE's packets as answers; UDP's have another port each way
            kind = Kind(protocol, ip_network(address), ip_network(mine), protocol == "gre", port)
            yield name, kind, _TUNNEL, ("prerouting", "input"), link


def opening(closed: Closed, query: Query) -> str:
    """Return the command that lets the mesh's packets through."""
    tunnel = closed.hook == "input" and closed.family != "bridge"
    protocol, port = query.tunnel[:2] if query.tunnel else ("gre", 0)
    if closed.table == "firewalld":
        if tunnel:
            what = f"--add-port={port}/udp" if port else f"--add-protocol={protocol}"
            return f"`firewall-cmd --permanent {what} && firewall-cmd --reload`"
        return f"`firewall-cmd --permanent --zone=trusted --add-interface={KBR} && firewall-cmd --reload`"
    if closed.chain.startswith("ufw"):
        return f"`ufw allow proto {protocol} from any`" if tunnel else f"`ufw route allow in on {KBR} out on {KBR}`"
    if closed.family in ("ip", "ip6") and closed.base.isupper():
        tool = "iptables" if closed.family == "ip" else "ip6tables"
        match = f"-{'o' if closed.hook == 'postrouting' else 'i'} {KBR}"
        if tunnel:
            match = f"-p {protocol}{f' --dport {port}' if port else ''}"
        return f"`{tool} -t {closed.table} -I {closed.base} {match} -j ACCEPT`"
    rule = f"nft insert rule {closed.family} {printable(closed.table)} {printable(closed.base)}"
    keep = "and the same in the file that this table is loaded from"
    if tunnel:
        return f"`{rule} {f'{protocol} dport {port}' if port else f'meta l4proto {protocol}'} accept`, {keep}"
    if closed.family in ("bridge", "netdev"):
        sources = [f"`{rule} {'ip' if net.version == 4 else 'ip6'} saddr {net} accept`" for net in query.ranges]
        more = [f"`{rule} ether type arp accept`"] if any(net.version == 4 for net in query.ranges) else []
        more += [f"`{rule} meta l4proto ipv6-icmp accept`"] if any(net.version == 6 for net in query.ranges) else []
        return f"{' and '.join([*sources, *more])}, {keep}"
    links = {"prerouting": f"iifname {KBR}", "postrouting": f"oifname {KBR}"}
    return f"`{rule} {links.get(closed.hook, f'iifname {KBR} oifname {KBR}')} accept`, {keep}"


def remedied(found: FilterFound, query: Query) -> FilterFound:
    """Return what a trace has found, with the command that lets its packets through beside each drop."""
    if not any(drop.chain[0] for drop in found.drops):
        return found
    ruleset, drops = read(), []
    for drop in found.drops:
        base, hook = ruleset.base(*drop.chain)
        if base:
            closed = Closed(drop.chain[0], drop.chain[1], base, hook, drop.chain[2], 0)
            drop = drop._replace(todo=f"delete or correct that rule, or let the mesh through: {opening(closed, query)}")
        drops.append(drop)
    return replace(found, drops=tuple(drops))


def read() -> Ruleset:
    """Read the tables of others now, each on its own: nft 1.0.6 writes invalid JSON for some expressions."""
    chains = Ruleset(output("nft", "-j", "list", "chains") or "").tables
    filters = [key for key, table in chains.items() if any(one.type == "filter" for one in table.chains.values())]
    return Ruleset(*(output("nft", "-a", "-j", "list", "table", *key) or "" for key in filters))


def look(query: Query) -> tuple[Problem, ...]:
    """Read the tables of others now, and return what in them drops packets of the mesh."""
    return refusals(query, read())
