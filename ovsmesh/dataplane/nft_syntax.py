"""What nft and iptables print and read: their texts turned into tables, and rules into their scripts.

Knows: nft's scripts and JSON, and iptables-save's lines. Pure: runs nothing; imports filters and model.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, NamedTuple

from ovsmesh.dataplane.firewall_rules import CHAINS, SETS, Chain, digest
from ovsmesh.dataplane.types import MARK, Rule, RuleKey

_COMMENT = re.compile(r"([a-z0-9-]+) ([0-9a-f]{8})")
_IPT_COMMENT = re.compile(rf"{MARK}:([a-z0-9-]+):([0-9a-f]{{8}})")


class Unreadable(Exception):
    """Not what the tool is known to print."""


class Row(NamedTuple):
    chain: str
    name: str
    digest: str
    """"" for a rule that is not ours."""
    spec: str = ""
    """iptables: the rule as a line of iptables-save, without -A."""


@dataclass(slots=True)
class Table:
    """What one tool holds: an nft table of ours, or iptables' FORWARD chain."""

    rows: tuple[Row, ...] = ()
    present: bool = False
    chains: dict[str, Chain] = field(default_factory=dict)
    sets: dict[str, set[str]] = field(default_factory=dict)
    drops: bool = False
    """iptables: FORWARD has a policy other than ACCEPT, or rules of others."""


def _element(item: Any) -> str:
    if isinstance(item, dict):
        item = item.get("elem", {}).get("val", "") if isinstance(item.get("elem"), dict) else ""
    text = str(item)
    # inet_ntop writes ::ffff:192.0.2.1, Python ::ffff:c000:201
    return str(ip_address(text)) if ":" in text and "." in text else text


def parse_nft(text: str) -> Table:
    """An nft table from `nft -j list table`. Raises Unreadable for what is not that."""
    table = Table(present=True)
    rows = []
    flagged = False
    try:
        for item in json.loads(text)["nftables"]:
            if "flags" in item.get("table", {}):
                # dormant or the like; nft 1.0.6 prints it as random memory, so which one can't be told
                flagged = True
            elif chain := item.get("chain"):
                good = chain.get("policy") == "accept"
                found = Chain(chain.get("type", ""), chain.get("hook", ""), chain.get("prio", 0) if good else -1)
                table.chains[chain["name"]] = found
            elif wanted := item.get("set"):
                shape = SETS.get(wanted["name"]) == wanted.get("type") and not wanted.get("flags")
                if shape:
                    table.sets[wanted["name"]] = set(map(_element, wanted.get("elem", ())))
            elif rule := item.get("rule"):
                ours = _COMMENT.fullmatch(rule.get("comment", ""))
                name, code = ours.groups() if ours else (f"handle-{rule['handle']}", "")
                rows.append(Row(rule["chain"], name, code))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Unreadable(f"nft: its JSON is not as expected ({e!r})") from None
    if flagged:
        table.chains.clear()
    table.rows = tuple(rows)
    return table


def parse_iptables(text: str) -> Table:
    """FORWARD's rules of ours, and whether anything else in it may drop, from `iptables -S FORWARD`."""
    table = Table(present=True)
    rows = []
    for line in text.splitlines():
        if line.startswith("-P "):
            table.drops = table.drops or not line.endswith(" ACCEPT")
        elif line.startswith("-A FORWARD "):
            try:
                words = shlex.split(line)
            except ValueError:
                words = []
            ours = next((m for w in words if (m := _IPT_COMMENT.fullmatch(w))), None)
            if ours:
                rows.append(Row("FORWARD", ours[1], ours[2], line[3:]))
            else:
                table.drops = True
    table.rows = tuple(rows)
    return table


def sets_used(texts: Iterable[str]) -> list[str]:
    joined = " ".join(texts)
    return [name for name in SETS if f"@{name}" in joined]


def rules_of(tool: str, rules: Mapping[RuleKey, Rule]) -> dict[RuleKey, Rule]:
    return {key: rule for key, rule in rules.items() if key[0] == tool}


def wanted_order(wanted: Mapping[RuleKey, Rule]) -> set[tuple[tuple[str, ...], ...]]:
    """Chain by chain, the names and digests in order: what two equal tables have in common."""
    return by_chain((key[1], key[2], digest(key, rule)) for key, rule in wanted.items())


def by_chain(rows: Iterable[tuple[str, str, str]]) -> set[tuple[tuple[str, ...], ...]]:
    chains: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        chains.setdefault(row[0], []).append(row)
    return {tuple(rows) for rows in chains.values()}


def table_script(family: str, wanted: Mapping[RuleKey, Rule], peers: Mapping[str, str]) -> str:
    """An nft script that replaces our table of a family as a whole, in one transaction."""
    lines = [f"add table {family} {MARK}", f"delete table {family} {MARK}"]
    if not wanted:
        return "\n".join(lines) + "\n"
    lines.append(f"table {family} {MARK} {{")
    for name in sets_used(rule.text for rule in wanted.values()):
        elements = [address for address, where in peers.items() if where == name]
        filled = f"elements = {{ {', '.join(elements)} }};" if elements else ""
        lines.append(f"set {name} {{ type {SETS[name]}; {filled} }}")
    for chain in dict.fromkeys(key[1] for key in wanted):
        base = CHAINS[family, chain]
        lines.append(f"chain {chain} {{")
        lines.append(f"type {base.type} hook {base.hook} priority {base.priority}; policy accept;")
        for key, rule in wanted.items():
            if key[1] == chain:
                lines.append(f'{rule.text} comment "{key[2]} {digest(key, rule)}"')
        lines.append("}")
    return "\n".join([*lines, "}", ""])


def element_changes(family: str, held: Mapping[str, set[str]], wanted: Mapping[str, set[str]]) -> str:
    """An nft script that makes the sets of our table of a family hold the wanted elements; "" when they do."""
    lines = []
    for name, after in wanted.items():
        for verb, changed in (("add", after - held[name]), ("delete", held[name] - after)):
            if changed:
                lines.append(f"{verb} element {family} {MARK} {name} {{ {', '.join(sorted(changed))} }}\n")
    return "".join(lines)


def iptables_script(table: Table, wanted: Mapping[RuleKey, Rule]) -> str:
    """Input of iptables-restore that replaces our rules in FORWARD by the wanted ones, at its top."""
    lines = ["*filter", *(f"-D {row.spec}" for row in table.rows)]
    for n, (key, rule) in enumerate(wanted.items(), 1):
        match, _, target = rule.text.rpartition(" -j ")
        comment = f"-m comment --comment {MARK}:{key[2]}:{digest(key, rule)}"
        lines.append(f"-I FORWARD {n} {match} {comment} -j {target}")
    return "\n".join([*lines, "COMMIT", ""])
