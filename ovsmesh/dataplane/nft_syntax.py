"""Parse what nft and iptables print, and write the scripts that they read."""

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
    """The text is not what the tool is known to print."""


class Row(NamedTuple):
    """A rule as it was read back."""

    chain: str
    name: str
    digest: str
    """"" for an unmanaged rule."""
    spec: str = ""
    """iptables only: the rule as a line of iptables-save, without -A."""


@dataclass(slots=True)
class Table:
    """What one tool holds: a managed nft table, or iptables' FORWARD chain."""

    rows: tuple[Row, ...] = ()
    present: bool = False
    chains: dict[str, Chain] = field(default_factory=dict)
    sets: dict[str, set[str]] = field(default_factory=dict)
    drops: bool = False
    """iptables only: FORWARD has a policy other than ACCEPT, or unmanaged rules."""


def _element(item: Any) -> str:
    if isinstance(item, dict):
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
                good = chain.get("policy") == "accept"
                found = Chain(chain.get("type", ""), chain.get("hook", ""), chain.get("prio", 0) if good else -1)
                table.chains[chain["name"]] = found
            elif wanted := item.get("set"):
                shape = SETS.get(wanted["name"]) == wanted.get("type") and not wanted.get("flags")
                if shape:
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


def parse_iptables(text: str) -> Table:
    """Parse the output of `iptables -S FORWARD`: its managed rules, and whether anything else in it may drop."""
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
            managed = next((m for w in words if (m := _IPT_COMMENT.fullmatch(w))), None)
            if managed:
                rows.append(Row("FORWARD", managed[1], managed[2], line[3:]))
            else:
                table.drops = True
    table.rows = tuple(rows)
    return table


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
    """Return an nft script that makes the sets of the managed table hold the wanted elements; "" when they do."""
    lines = []
    for name, after in wanted.items():
        for verb, changed in (("add", after - held[name]), ("delete", held[name] - after)):
            if changed:
                lines.append(f"{verb} element {family} {MARK} {name} {{ {', '.join(sorted(changed))} }}\n")
    return "".join(lines)


def iptables_rule(key: RuleKey, rule: Rule) -> str:
    """Return a rule of FORWARD as arguments of iptables, with its ownership mark."""
    match, _, target = rule.text.rpartition(" -j ")
    return f"{match} -m comment --comment {MARK}:{key[2]}:{digest(key, rule)} -j {target}"


def iptables_script(table: Table, wanted: Mapping[RuleKey, Rule]) -> str:
    """Return input for iptables-restore that replaces the managed rules in FORWARD by the wanted ones, at its top."""
    lines = ["*filter", *(f"-D {row.spec}" for row in table.rows)]
    lines += [f"-I FORWARD {n} {iptables_rule(key, rule)}" for n, (key, rule) in enumerate(wanted.items(), 1)]
    return "\n".join([*lines, "COMMIT", ""])
