"""Parse what nft and iptables print, and write the scripts that they read."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from itertools import pairwise
from typing import Any, NamedTuple

from ovsmesh.dataplane.firewall_rules import CHAINS, SETS, Chain, digest
from ovsmesh.dataplane.types import KBR, MARK, Rule, RuleKey
from ovsmesh.mesh.types import IPNetwork, within

_COMMENT = re.compile(r"([a-z0-9-]+) ([0-9a-f]{8})")
_IPT_COMMENT = re.compile(rf"{MARK}:([a-z0-9-]+):([0-9a-f]{{8}})")


class Unreadable(Exception):
    """The text is not what the tool is known to print."""


class Row(NamedTuple):
    """A rule as it was read back."""

    chain: str
    name: str
    digest: str
    """"" for an unmanaged rule."""
    spec: str = ""
    """iptables only: the rule as a line of iptables-save, without -A."""
    ahead_of: str = ""
    """iptables only: the first unmanaged rule that stands behind it and should stand before it."""


@dataclass(slots=True)
class Table:
    """What one tool holds: a managed nft table, or iptables' FORWARD chain."""

    rows: tuple[Row, ...] = ()
    present: bool = False
    chains: dict[str, Chain] = field(default_factory=dict)
    sets: dict[str, set[str]] = field(default_factory=dict)
    drops: bool = False
    """iptables only: FORWARD has a policy other than ACCEPT, or unmanaged rules."""
    policy: str = "ACCEPT"
    """iptables only: that of FORWARD."""
    filter: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    """iptables only: chain of the table "filter" → the words of its rules, in order; managed rules are empty."""


def _element(item: Any) -> str:
    if isinstance(item, dict):
        if prefix := item.get("prefix"):
            return f"{ip_address(prefix['addr'])}/{prefix['len']}"
        item = item.get("elem", {}).get("val", "") if isinstance(item.get("elem"), dict) else ""
    text = str(item)
    # inet_ntop writes ::ffff:192.0.2.1, Python ::ffff:c000:201
    return str(ip_address(text)) if ":" in text and "." in text else text


def parse_nft(text: str) -> Table:
    """Parse the output of `nft -j list table`. Raises Unreadable."""
    table = Table(present=True)
    rows = []
    flagged = False
    try:
        for item in json.loads(text)["nftables"]:
            if "flags" in item.get("table", {}):
                # dormant or the like; nft 1.0.6 prints random memory as flags, so they can't be read
                flagged = True
            elif chain := item.get("chain"):
                good = chain.get("policy", "accept") == "accept"
                found = Chain(chain.get("type", ""), chain.get("hook", ""), chain.get("prio", 0) if good else -1)
                table.chains[chain["name"]] = found
            elif wanted := item.get("set"):
                flags = "".join(f"; flags {flag}" for flag in wanted.get("flags", ()))
                if SETS.get(wanted["name"]) == f"{wanted.get('type')}{flags}":
                    table.sets[wanted["name"]] = set(map(_element, wanted.get("elem", ())))
            elif rule := item.get("rule"):
                managed = _COMMENT.fullmatch(rule.get("comment", ""))
                name, code = managed.groups() if managed else (f"handle-{rule['handle']}", "")
                rows.append(Row(rule["chain"], name, code))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Unreadable(f"nft: its JSON is not as expected ({e!r})") from None
    if flagged:
        table.chains.clear()
    table.rows = tuple(rows)
    return table


def filters_forward(text: str) -> bool:
    """Return whether `nft -j list chains` shows a chain for forwarded packets, neither managed nor of iptables.

    Raises Unreadable.
    """
    try:
        chains = [item["chain"] for item in json.loads(text)["nftables"] if "chain" in item]
        return any(
            chain.get("hook") == "forward"
            and chain["family"] in ("ip", "ip6", "inet")
            and not chain["table"].startswith(MARK)
            and not (chain["name"] == "FORWARD" and chain["table"] in ("filter", "mangle", "security"))
            for chain in chains
        )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Unreadable(f"nft: its JSON is not as expected ({e!r})") from None


def filters_only_ipv4(four: Table, six: Table, link: str) -> bool:
    """Return whether others accept some of what FORWARD carries for this link in IPv4, and nobody does for IPv6.

    `four` is what iptables holds, `six` what ip6tables does. So Docker up to 26 is, where daemon.json does not say
    ip6tables. A chain of the same name in both is taken for a writer of both, who may be about to add the link.
    """
    accepted = _accepted(four, link)
    return bool(accepted) and not accepted & six.filter.keys() and not _accepted(six, link)


def _accepted(table: Table, link: str) -> set[str]:
    """Return the targets of rules of others about a link that may accept: ACCEPT, and chains."""
    chains, found = ["FORWARD"], set()
    for chain in chains:
        for words in table.filter.get(chain, ()):
            given = list(pairwise(words))
            targets = {value for option, value in given if option in _JUMPS and value in (*table.filter, "ACCEPT")}
            chains += [name for name in targets if name in table.filter and name not in chains]
            links = [value for option, value in given if option in ("-i", "-o")]
            if any(link == name or (name.endswith("+") and link.startswith(name[:-1])) for name in links):
                found |= targets
    return found


def parse_iptables(text: str) -> Table:
    """Parse the output of `iptables -S`: FORWARD's managed rules, what else is in it, and the chains that it calls."""
    table = Table(present=True)
    rows: list[Row] = []
    for line in text.splitlines():
        kind, chain, *_ = [*line.split(maxsplit=2), "", ""]
        if kind == "-P" and chain == "FORWARD":
            table.policy = line.split()[-1]
        if kind == "-N":
            table.filter.setdefault(chain, [])
        if kind != "-A":
            continue
        try:
            words = shlex.split(line)[2:]
        except ValueError:
            words = ["-m", "unreadable"]
        managed = next((m for w in words if (m := _IPT_COMMENT.fullmatch(w))), None) if chain == "FORWARD" else None
        table.filter.setdefault(chain, []).append(() if managed else tuple(words))
        if managed:
            rows.append(Row("FORWARD", managed[1], managed[2], line[3:]))
        elif chain == "FORWARD" and not _stays_last(words):
            rows = [row if row.ahead_of else row._replace(ahead_of=line) for row in rows]
    table.drops = table.policy != "ACCEPT" or any(table.filter.get("FORWARD", ()))
    table.rows = tuple(rows)
    return table


def _stays_last(words: Sequence[str]) -> bool:
    """Return whether a rule may stand behind the managed ones: it accepts marked packets, as Calico's does.

    Calico keeps that rule at the end of FORWARD, as ovsmesh keeps its own: the two would take turns without end.
    """
    return "mark" in words and list(words[-2:]) == ["-j", "ACCEPT"]


def sets_used(texts: Iterable[str]) -> list[str]:
    """Return the names of the sets that these rules refer to."""
    joined = " ".join(texts)
    return [name for name in SETS if f"@{name}" in joined]


def rules_of(tool: str, rules: Mapping[RuleKey, Rule]) -> dict[RuleKey, Rule]:
    """Return the rules of one nft family, or of one of iptables and ip6tables."""
    return {key: rule for key, rule in rules.items() if key[0] == tool}


def wanted_order(wanted: Mapping[RuleKey, Rule]) -> set[tuple[tuple[str, ...], ...]]:
    """Return chain by chain the names and digests in order: what two equal tables have in common."""
    return by_chain((key[1], key[2], digest(key, rule)) for key, rule in wanted.items())


def by_chain(rows: Iterable[tuple[str, str, str]]) -> set[tuple[tuple[str, ...], ...]]:
    """Return rows (chain, name, digest) chain by chain, in order within each."""
    chains: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        chains.setdefault(row[0], []).append(row)
    return {tuple(rows) for rows in chains.values()}


def table_script(family: str, wanted: Mapping[RuleKey, Rule], peers: Mapping[str, str]) -> str:
    """Return an nft script that replaces the managed table of a family as a whole, in one transaction."""
    lines = [f"add table {family} {MARK}", f"delete table {family} {MARK}"]
    if not wanted:
        return "\n".join(lines) + "\n"
    lines.append(f"table {family} {MARK} {{")
    for name in sets_used(rule.text for rule in wanted.values()):
        elements = _apart(name, [element for element, where in peers.items() if where == name])
        filled = f"elements = {{ {', '.join(elements)} }};" if elements else ""
        lines.append(f"set {name} {{ type {SETS[name]}; {filled} }}")
    for chain in dict.fromkeys(key[1] for key in wanted):
        base = CHAINS[family, chain]
        lines.append(f"chain {chain} {{")
        if base.hook:
            lines.append(f"type {base.type} hook {base.hook} priority {base.priority}; policy accept;")
        for key, rule in wanted.items():
            if key[1] == chain:
                lines.append(f'{rule.text} comment "{key[2]} {digest(key, rule)}"')
        lines.append("}")
    return "\n".join([*lines, "}", ""])


def _apart(name: str, elements: Collection[str]) -> Collection[str]:
    """Return the elements of a set; of ranges that overlap, as of a peer whose removal is held, only the widest."""
    if "interval" not in SETS[name]:
        return elements
    every = sorted(map(ip_network, elements), key=lambda r: (int(r.network_address), r.prefixlen))
    found: list[Any] = []
    for one in every:
        if not found or not one.subnet_of(found[-1]):
            found.append(one)
    return [str(one) for one in found]


def element_changes(family: str, held: Mapping[str, set[str]], wanted: Mapping[str, set[str]]) -> str:
    """Return an nft script that makes the sets of the managed table hold the wanted elements; "" when they do."""
    lines = []
    for name, every in wanted.items():
        after = set(_apart(name, every))
        # what is deleted may overlap what is added
        for verb, changed in (("delete", held[name] - after), ("add", after - held[name])):
            if changed:
                lines.append(f"{verb} element {family} {MARK} {name} {{ {', '.join(sorted(changed))} }}\n")
    return "".join(lines)


def iptables_rule(key: RuleKey, rule: Rule) -> str:
    """Return a rule of FORWARD as arguments of iptables, with its ownership mark."""
    match, _, target = rule.text.rpartition(" -j ")
    return f"{match} -m comment --comment {MARK}:{key[2]}:{digest(key, rule)} -j {target}"


def iptables_script(table: Table, wanted: Mapping[RuleKey, Rule]) -> str:
    """Return input for iptables-restore that replaces the managed rules in FORWARD by the wanted ones, at its end.

    There they stand behind every rule and chain of others, who may so refuse the mesh's packets.
    """
    lines = ["*filter", *(f"-D {row.spec}" for row in table.rows)]
    lines += [f"-A FORWARD {iptables_rule(key, rule)}" for key, rule in wanted.items()]
    return "\n".join([*lines, "COMMIT", ""])


# What others refuse in FORWARD, before the managed rules


class ClosingRule(NamedTuple):
    """The rule of others that refuses packets of the mesh. `number` 0 is the policy of the chain."""

    chain: str
    number: int
    words: tuple[str, ...]


Ranges = tuple[tuple[IPNetwork | None, IPNetwork | None], ...]
"""Each of this node's ranges beside each range of the mesh."""
_ICMP = ("icmp", "ipv6-icmp")
_PROTOCOLS = ("tcp", "udp", "icmp")
_JUMPS = ("-j", "-g")
_REFUSES = ("DROP", "REJECT")


def accepted_ranges(rules: Mapping[RuleKey, Rule]) -> Ranges:
    """Return the ranges that the wanted accept rules of a tool are about."""
    texts = [rule.text.split() for key, rule in rules.items() if key[2].startswith("mesh-out")]
    return tuple((ip_network(t[t.index("-s") + 1]), ip_network(t[t.index("-d") + 1])) for t in texts)


def refusal(table: Table, own: IPNetwork | None, cluster: IPNetwork | None, policy: bool = False) -> ClosingRule | None:
    """Return what refuses all new packets of some kind between `own` and `cluster` from kbr0 to kbr0, None for nothing.

    A kind is a protocol in one of the two directions. A rule that may or may not match, as one about ports or marks,
    counts as one that does not. With `policy`, the policy of FORWARD counts too: no managed rules are in this table.
    """
    for source, target in ((own, cluster), (cluster, own)):
        for protocol in _PROTOCOLS:
            found = _walk(table, "FORWARD", _Packet(source, target, protocol), 0)
            if isinstance(found, ClosingRule):
                return found
            if not found and policy and table.policy != "ACCEPT":
                return ClosingRule("FORWARD", 0, (table.policy,))
    return None


class _Packet(NamedTuple):
    """A kind of packet; addresses of None may be any."""

    source: IPNetwork | None
    target: IPNetwork | None
    protocol: str


_MOST_JUMPS = 16


def _walk(table: Table, chain: str, packet: _Packet, depth: int) -> ClosingRule | bool:
    """Return what a chain does to a packet: who refuses it, True where it is accepted, False where it goes on."""
    for number, words in enumerate(table.filter.get(chain, ()), 1):
        at = next((n for n, word in enumerate(words[:-1]) if word in _JUMPS), None)
        if at is None or not _matches(words[:at], packet):
            continue
        target = words[at + 1]
        if target in _REFUSES:
            return ClosingRule(chain, number, words)
        if target in ("ACCEPT", "NFQUEUE", "QUEUE"):
            return True
        if target == "RETURN":
            return False
        if target in table.filter and depth < _MOST_JUMPS:
            found = _walk(table, target, packet, depth + 1)
            if found or words[at] == "-g":
                return found
    return False


def _matches(words: Sequence[str], packet: _Packet) -> bool:
    """Return whether a match is sure to apply to all packets of this kind, as the first of their connection."""
    rest = list(words)
    while rest:
        inverted = rest[0] == "!"
        if inverted:
            rest.pop(0)
        option, *rest = rest or [""]
        if option == "-m":
            rest = rest[1:]
            continue
        value, *rest = rest or [""]
        if option == "--comment":
            continue
        if option in ("-i", "-o"):
            hit: bool | None = value == KBR or (value.endswith("+") and KBR.startswith(value[:-1]))
        elif option in ("-s", "-d"):
            hit = _covers(value, packet.source if option == "-s" else packet.target)
        elif option == "-p":
            hit = value == packet.protocol or (value in _ICMP and packet.protocol == "icmp") or value == "all"
        elif option in ("--ctstate", "--state"):
            hit = "NEW" in value.split(",")
        else:
            return False
        if hit is None or hit is inverted:
            return False
    return True


def _covers(text: str, inner: IPNetwork | None) -> bool | None:
    """Return whether a range holds all of another, False for none of it, None for a part."""
    try:
        outer = ip_network(text, strict=False)
    except ValueError:
        return None
    if inner is None or outer.version != inner.version:
        return None
    if outer.overlaps(inner):
        return True if within(inner, outer) else None
    return False


def refused(tool: str, found: ClosingRule) -> str:
    """Return what a rule refuses and how the mesh is let through, for the reader."""
    number, chain, words = found.number, found.chain, shlex.join(found.words)
    what = f"rule {number} of chain {chain} (`{words}`)" if number else f"policy {words} of chain {chain}"
    return (
        f"{what} refuses packets between this node's pods and its peers'. The rules of ovsmesh stand behind those of "
        f"others and do not come to it. To let them through: {_opening(tool, found)}"
    )


def _opening(tool: str, found: ClosingRule) -> str:
    if found.number == 0:
        return f"`{tool} -A FORWARD -i {KBR} -o {KBR} -j ACCEPT`"
    if found.chain.startswith("ufw"):
        return f"`ufw route allow in on {KBR} out on {KBR}`"
    docker = found.chain == "FORWARD" or (found.chain.startswith("DOCKER") and found.chain != "DOCKER-USER")
    if docker and found.words == ("-i", KBR, "-o", KBR, "-j", "DROP"):
        return (
            f"take `icc: false` out of Docker's daemon.json and restart Docker; or, until then, {_insert(tool, found)}"
        )
    return _insert(tool, found)


def _insert(tool: str, found: ClosingRule) -> str:
    return f"`{tool} -I {found.chain} {found.number} -i {KBR} -o {KBR} -j ACCEPT`"
