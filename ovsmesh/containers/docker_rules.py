"""Find the iptables rules that dockerd leaves behind when it moves from one bridge to another.

Pure: output of `iptables -S` in, lines for iptables-restore out. A masquerade rule left for docker0's range would apply
to the mesh if that has the same range, and no other program removes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

TABLES = ("filter", "nat", "raw", "mangle")
_USER = "DOCKER-USER"
_CONNECTED = r"-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"


def _shapes(bridge: str) -> re.Pattern[str]:
    """Match rules outside of Docker's own chains, as dockerd 20 to 28 writes them."""
    b = re.escape(bridge)
    forward = rf"-A FORWARD (-o {b} ({_CONNECTED}|-j DOCKER)|-i {b} ! -o {b} -j ACCEPT|-i {b} -o {b} -j (ACCEPT|DROP))"
    nat = rf"-A POSTROUTING -s \S+ ! -o {b} -j MASQUERADE"
    return re.compile(rf"{forward}|{nat}")


def left(listings: Mapping[str, str], bridge: str) -> list[str]:
    """Return the rules for this bridge, as "TABLE RULE" in their order. The chain DOCKER-USER is the user's."""
    shapes, mentions = _shapes(bridge), re.compile(rf"(^| )-[io] {re.escape(bridge)}( |$)")
    rules = []
    for table, text in listings.items():
        for line in text.splitlines():
            chain = [*line.split(), "", ""][1]
            docker = chain == "DOCKER" or (chain.startswith("DOCKER-") and chain != _USER)
            if line.startswith("-A ") and ((docker and mentions.search(line)) or shapes.fullmatch(line)):
                rules.append(f"{table} {line[3:]}")
    return rules


def removal(rules: Iterable[str]) -> str:
    """Return the input of `iptables-restore --noflush` that deletes the rules, in one transaction a table."""
    tables: dict[str, list[str]] = {}
    for rule in rules:
        table, _, text = rule.partition(" ")
        tables.setdefault(table, []).append(f"-D {text}")
    return "".join(f"*{table}\n" + "\n".join(lines) + "\nCOMMIT\n" for table, lines in tables.items())
