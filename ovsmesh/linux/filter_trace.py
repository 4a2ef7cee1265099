"""What the packet filter of this host does to the packets of a trace: tables of everybody, nft and iptables alike.

Where the kernel can trace packets, it names the rule itself. Else, and for iptables-legacy, which it does not trace,
rules whose counters grew meanwhile are named.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ovsmesh.dataplane.types import Drop, FilterFound, HookCount
from ovsmesh.linux.nft_trace import PacketTrace, Pattern, Verdict
from ovsmesh.text import printable

_ETHERNET = 14
_TIMEOUT = 10.0
"""Seconds for one tool."""
_LONGEST = 160
_LEGACY = {
    "iptables-legacy": "/proc/net/ip_tables_names",
    "ip6tables-legacy": "/proc/net/ip6_tables_names",
    "ebtables-legacy": "",
}
_DROPS = re.compile(r"-j (DROP|REJECT|TARPIT|STEAL)\b")
_COUNTED = re.compile(r"\[(\d+):\d+\]")


class Encapsulation(NamedTuple):
    """What stands before the inner IP packet, from the outer IP header on, in bytes."""

    protocol: str
    outer: int
    """Of the outer IP header."""
    header: int
    """Of GRE, or UDP and VXLAN or Geneve."""

    @property
    def inner(self) -> int:
        """Offset of the inner IP header from the outer one."""
        return self.outer + self.header + _ETHERNET


def encapsulation(protocol: str, keyed: bool, version: int) -> Encapsulation:
    """Return how tunnel packets look. A GRE key takes four bytes more (RFC 2890)."""
    return Encapsulation(protocol, 20 if version == 4 else 40, (8 if keyed else 4) if protocol == "gre" else 16)


def offsets(version: int) -> tuple[int, int]:
    """Return where the token stands in an echo packet, and in an ICMP error about one, from the IP header on."""
    return (28, 56) if version == 4 else (48, 96)


def patterns(version: int, token: bytes, form: Encapsulation | None) -> list[Pattern]:
    """Return what the packets of a trace look like to a filter: bare, quoted in an ICMP error, and in a tunnel."""
    echo, error = offsets(version)
    request, reply = (b"\x08", b"\x00") if version == 4 else (b"\x80", b"\x81")
    kinds = [("out", echo, request), ("back", echo, reply), ("error", error, request)]
    found = [Pattern(name, ((at - 8, kind), (at, token))) for name, at, kind in kinds]
    if form is not None:
        found += [
            Pattern(f"tunnel {name}", ((form.inner + at - 8, kind), (form.inner + at, token)))
            for name, at, kind in kinds[:2]
        ]
    return found


def _run(argv: Sequence[str]) -> str | None:
    """Return what a tool prints; None where it is missing or fails."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


class Filters:
    """Looks at the packet filter from its making until `found`."""

    def __init__(self, matches: Sequence[Pattern], devices: Sequence[str]) -> None:
        """`devices`: the links on which packets of the trace arrive."""
        self._trace: PacketTrace | None = None
        self._why = ""
        try:
            self._trace = PacketTrace(matches, devices)
        except OSError as error:
            self._why = f"the kernel follows no packet through its filter for us ({error.strerror})"
        self._before = self._counters()
        self._verdicts: Counter[Verdict] = Counter()

    def close(self) -> None:
        """Remove what was made to look."""
        if self._trace:
            self._trace.close()

    def drain(self) -> None:
        """Take in what the kernel has told so far."""
        if self._trace:
            self._verdicts += self._trace.verdicts()

    @property
    def marks(self) -> set[int]:
        """Packet marks that packets of the trace had."""
        return self._trace.marks if self._trace else set()

    def found(self) -> FilterFound:
        """Return what was dropped where since this was made."""
        self.drain()
        drops = [self._named(verdict) for verdict in self._verdicts]
        hooks = []
        if self._trace:
            for (family, hook, name), count in self._trace.passed().items():
                if count.first or count.last:
                    where = f"{family} {hook}" + (" (tunnel)" if name.startswith("tunnel") else "")
                    hooks.append(HookCount(where, count.first, count.last, name.endswith("back")))
        suspects = _suspects(_run(["nft", "list", "ruleset"]) or "")
        suspects += [
            Drop(f"`{printable(rule, _LONGEST)}`", tool, certain=False)
            for tool, rule in self._before
            if "legacy" in tool and not re.search(r"(-A|of) (INPUT|OUTPUT)\b", rule)
        ]
        grown = self._grown()
        # nf_tables has named its own rules, iptables-nft's among them
        grown = [drop for drop in grown if "legacy" in drop.table] if self._trace else grown or suspects
        return FilterFound((*drops, *grown), tuple(hooks), _tables(), tuple(suspects), self._why)

    def _named(self, verdict: Verdict) -> Drop:
        table = f"{verdict.family} {verdict.table}"
        if verdict.handle == 0:
            return Drop(f"policy {verdict.what} of chain {printable(verdict.chain)}", f"table {printable(table)}")
        text = ""
        argv = ["nft", "-a", "list", "chain", verdict.family, verdict.table, verdict.chain]
        for line in (_run(argv) or "").splitlines():
            rule, _, handle = line.strip().rpartition(" # handle ")
            if handle == str(verdict.handle) and rule:
                text = re.sub(r" ?counter packets \d+ bytes \d+", "", rule).strip()
        text = printable(text or f"rule {verdict.handle}", _LONGEST)
        return Drop(f"`{text}` in chain {printable(verdict.chain)}", f"table {printable(table)}")

    def _grown(self) -> list[Drop]:
        found = []
        for (tool, rule), count in self._counters().items():
            if count > self._before.get((tool, rule), 0):
                found.append(Drop(f"`{printable(rule, _LONGEST)}`", tool, certain=False))
        return found

    @staticmethod
    def _counters() -> Counter[tuple[str, str]]:
        """Return (tool, rule or policy that drops) → packets that it has counted."""
        found: Counter[tuple[str, str]] = Counter()
        for tool, names in _LEGACY.items():
            # asking would load its modules
            if names and (not Path(names).exists() or not Path(names).read_text().split()):
                continue
            if not names and not Path("/sys/module/ebtable_filter").exists():
                continue
            argv = [tool, "-t", "filter", "-L", "--Lc"] if not names else [f"{tool}-save", "-c"]
            found.update(dict(_parse(tool, _run(argv) or "")))
        for tool in ("iptables-nft", "ip6tables-nft"):
            found.update(dict(_parse(tool, _run([f"{tool}-save", "-c"]) or "")))
        return found


def _parse(tool: str, text: str) -> list[tuple[tuple[str, str], int]]:
    """Return what may drop in the output of iptables-save -c, or of ebtables -L --Lc, with its count."""
    found = []
    table = ""
    for line in text.splitlines():
        counted = _COUNTED.search(line)
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":") and " DROP " in line and counted:
            found.append(((f"{tool}, table {table}", f"policy DROP of {line[1:].split()[0]}"), int(counted[1])))
        elif counted and _DROPS.search(line):
            found.append(((f"{tool}, table {table}", line[counted.end() :].strip()), int(counted[1])))
        elif "pcnt = " in line and _DROPS.search(line):
            rule, _, count = line.partition(", pcnt = ")
            found.append(((tool, rule), int(count.split()[0])))
    return found


def _suspects(ruleset: str) -> list[Drop]:
    """Return what in the tables of others drops forwarded packets of some kind."""
    found, table, chain, hook = [], "", "", ""
    for line in map(str.strip, ruleset.splitlines()):
        if line.startswith(("table ", "chain ")):
            hook = ""
        if line.startswith("type "):
            hook = line.split(" hook ")[-1].split()[0]
        if hook in ("input", "output", "ingress"):
            continue
        if line.startswith("table "):
            table = line.removesuffix(" {")
        elif line.startswith("chain "):
            chain = line.removeprefix("chain ").removesuffix(" {")
        elif re.search(r"\b(drop|reject)\b", line) and not table.endswith(" ovsmesh"):
            what = f"policy drop of chain {chain}" if line.startswith("type ") else f"`{line}` in chain {chain}"
            found.append(Drop(printable(what, _LONGEST), printable(table), certain=False))
    return found


def _tables() -> tuple[str, ...]:
    """Return the tables of others that hold a filter."""
    names = [line.removeprefix("table ").strip() for line in (_run(["nft", "list", "tables"]) or "").splitlines()]
    found = [name for name in names if "ovsmesh" not in name]
    for tool, path in _LEGACY.items():
        with contextlib.suppress(OSError):
            if path and Path(path).read_text().split():
                found.append(tool)
    return tuple(printable(name) for name in found)
