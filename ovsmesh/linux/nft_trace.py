"""Follow single packets through the packet filter: where they pass, and which rule or policy drops them.

A table of our own counts them at the first and the last place of each hook, and asks nf_tables to trace them through
everybody's tables, those of iptables-nft too. The table has an owner, the netlink socket, so the kernel removes it
with the process, however that ends (Linux 5.12). Messages and numbers are those of
<linux/netfilter/nf_tables.h>. They are packed here: pyroute2 (0.9) calls its classes for nfnetlink a beginning that is
not public yet. Where the kernel can't trace, and for iptables-legacy, rules whose counters grew meanwhile are named.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ovsmesh.bounded import output
from ovsmesh.dataplane.types import Drop, FilterFound, HookCount
from ovsmesh.linux import netlink_socket
from ovsmesh.linux.netlink_socket import Message, NetlinkSocket, attributes
from ovsmesh.text import printable

FAMILIES = {"inet": 1, "ip": 2, "arp": 3, "netdev": 5, "bridge": 7, "ip6": 10}
HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
"""Hook number → name, in the inet and the bridge family."""
_SUBSYSTEM = 10
_NEWTABLE, _NEWCHAIN, _NEWRULE, _GETRULE, _TRACE = 0, 3, 6, 7, 17
_BATCH_BEGIN, _BATCH_END, _NFNLGRP_NFTRACE = 16, 17, 9
_REQUEST, _DUMP, _CREATE, _APPEND = 0x1, 0x300, 0x400, 0x800
_OWNER = 0x2
_ACCEPT = 1
_NESTED = 0x8000
_REGISTER = 1
_NETWORK_HEADER = 1
_META_NFTRACE = 12
_FIRST, _LAST = -2147483640, 2147483640
_NAME = "ovsmesh-trace"
_NF_DROP, _NF_ACCEPT, _NF_QUEUE = 0, 1, 3
_ETHERNET = 14
_LONGEST = 160
_LEGACY = {
    "iptables-legacy": "/proc/net/ip_tables_names",
    "ip6tables-legacy": "/proc/net/ip6_tables_names",
    "ebtables-legacy": "",
}
_DROPS = re.compile(r"-j (DROP|REJECT|TARPIT|STEAL)\b")
_COUNTED = re.compile(r"\[(\d+):\d+\]")


class Pattern(NamedTuple):
    """What a packet has at which offset from its network header, and the name under which it is counted."""

    name: str
    fields: tuple[tuple[int, bytes], ...]


class Verdict(NamedTuple):
    """A rule or a policy that ended the way of a traced packet."""

    family: str
    table: str
    chain: str
    handle: int
    """The rule's; 0 for the chain's policy."""
    what: str
    """"drop" or "queue"."""


class Passed(NamedTuple):
    """How many packets were counted at the first and at the last place of a hook."""

    first: int
    last: int


class PacketTrace:
    """Counts and traces what matches the patterns until `close`. Not thread-safe."""

    def __init__(self, patterns: Sequence[Pattern], devices: Iterable[str] = ()) -> None:
        """Make the table. `devices`: where packets are traced from their arrival on, before any other filter.

        Raises OSError where the kernel has no nf_tables, or no tables with an owner.
        """
        self._patterns = [pattern.name for pattern in patterns]
        self.marks: set[int] = set()
        """Packet marks that traced packets had."""
        # two at once may have one process id, in two containers
        self._table = f"{_NAME}-{os.urandom(4).hex()}".encode()
        self._requests = NetlinkSocket(netlink_socket.NETFILTER)
        try:
            self._events = NetlinkSocket(netlink_socket.NETFILTER, [_NFNLGRP_NFTRACE], 4 << 20)
            try:
                self._families = [f for f in ("inet", "bridge") if self._make(f, patterns)]
                if "inet" not in self._families:
                    raise OSError(errno.EOPNOTSUPP, "the kernel has no table that ends with its owner")
                for device in devices:
                    self._make("netdev", patterns, device)
            except BaseException:
                self._events.close()
                raise
        except BaseException:
            self._requests.close()
            raise

    def close(self) -> None:
        """Close the sockets, and with them the table."""
        self._events.close()
        self._requests.close()

    def __enter__(self) -> PacketTrace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, family: str, patterns: Sequence[Pattern], device: str = "") -> bool:
        """Make the table of one family, and return whether the kernel took it."""
        name = self._table + (f"-{device}".encode() if device else b"")
        number = FAMILIES[family]
        batch = [
            _message(_BATCH_BEGIN, _REQUEST, struct.pack("!BBH", 0, 0, _SUBSYSTEM)),
            _nft(_NEWTABLE, number, _CREATE, _text(1, name) + _u32(2, _OWNER)),
        ]
        places = [("ingress_first", 0, _FIRST)] if device else []
        for hook, hook_name in enumerate(() if device else HOOKS):
            places += [(f"{hook_name}_first", hook, _FIRST), (f"{hook_name}_last", hook, _LAST)]
        for chain, hook, priority in places:
            where = _u32(1, hook) + _attribute(2, struct.pack("!i", priority))
            where += _text(3, device.encode()) if device else b""
            body = _text(1, name) + _text(3, chain.encode()) + _attribute(4 | _NESTED, where)
            body += _u32(5, _ACCEPT) + _text(7, b"filter")
            batch.append(_nft(_NEWCHAIN, number, _CREATE, body))
            for pattern in patterns:
                expressions = b"".join(_matches(pattern)) + _expression("counter", b"")
                if chain.endswith("_first"):
                    expressions += _trace_on()
                body = _text(1, name) + _text(2, chain.encode()) + _attribute(4 | _NESTED, expressions)
                batch.append(_nft(_NEWRULE, number, _CREATE | _APPEND, body))
        batch.append(_message(_BATCH_END, _REQUEST, struct.pack("!BBH", 0, 0, _SUBSYSTEM)))
        return not self._requests.transaction(batch)

    def passed(self) -> dict[tuple[str, str, str], Passed]:
        """Return (family, hook, pattern) → how many packets its first and its last place have counted."""
        found: dict[tuple[str, str, str], Passed] = {}
        for family in self._families:
            counts: dict[str, list[int]] = {}

            def take(message: Message, counts: dict[str, list[int]] = counts) -> None:
                attrs = attributes(message.payload, 4)
                chain = attrs.get(2, b"").rstrip(b"\0").decode()
                counts.setdefault(chain, []).append(_packets(attrs.get(4, b"")))

            request = _nft(_GETRULE, FAMILIES[family], _DUMP, _text(1, self._table))
            self._requests.request(request, take)
            for hook in HOOKS:
                first, last = counts.get(f"{hook}_first", []), counts.get(f"{hook}_last", [])
                for pattern, before, after in zip(self._patterns, first, last, strict=False):
                    found[family, hook, pattern] = Passed(before, after)
        return found

    def verdicts(self) -> Counter[Verdict]:
        """Return what ended the way of traced packets since the last call, and how often."""
        found: Counter[Verdict] = Counter()
        for message in self._events.notifications():
            if message.type == (_SUBSYSTEM << 8 | _TRACE):
                verdict = self._verdict(message)
                if verdict is not None:
                    found[verdict] += 1
        return found

    def _verdict(self, message: Message) -> Verdict | None:
        attrs = attributes(message.payload, 4)
        if mark := int.from_bytes(attrs.get(14, b"")):
            self.marks.add(mark)
        policy = int.from_bytes(attrs.get(4, b"")) == 1
        nested = attributes(memoryview(attrs.get(5, b"")))
        code = int.from_bytes(attrs.get(16, b"\0\0\0\1") if policy else nested.get(1, b"\0\0\0\1"))
        what = {_NF_DROP: "drop", _NF_QUEUE: "queue"}.get(code & 0xFF if code < 1 << 31 else _NF_ACCEPT)
        if what is None:
            return None
        table, chain = (attrs.get(n, b"").rstrip(b"\0").decode(errors="replace") for n in (1, 2))
        family = next((f for f, n in FAMILIES.items() if n == message.payload[0]), str(message.payload[0]))
        return Verdict(family, table, chain, 0 if policy else int.from_bytes(attrs.get(3, b"")), what)


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", len(data) + 4, kind) + data + b"\0" * (-len(data) % 4)


def _text(kind: int, text: bytes) -> bytes:
    return _attribute(kind, text + b"\0")


def _u32(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("!I", value))


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body


def _nft(kind: int, family: int, flags: int, body: bytes) -> bytes:
    return _message(_SUBSYSTEM << 8 | kind, _REQUEST | flags, struct.pack("!BBH", family, 0, 0) + body)


def _expression(name: str, data: bytes) -> bytes:
    return _attribute(1 | _NESTED, _text(1, name.encode()) + _attribute(2 | _NESTED, data))


def _value(kind: int, value: bytes) -> bytes:
    return _attribute(kind | _NESTED, _attribute(1, value))


def _matches(pattern: Pattern) -> Iterable[bytes]:
    for offset, value in pattern.fields:
        where = _u32(2, _NETWORK_HEADER) + _u32(3, offset) + _u32(4, len(value))
        yield _expression("payload", _u32(1, _REGISTER) + where)
        yield _expression("cmp", _u32(1, _REGISTER) + _u32(2, 0) + _value(3, value))


def _trace_on() -> bytes:
    one = _expression("immediate", _u32(1, _REGISTER) + _value(2, b"\1"))
    return one + _expression("meta", _u32(2, _META_NFTRACE) + _u32(3, _REGISTER))


def _packets(expressions: bytes) -> int:
    """Return what the counter among a rule's expressions has counted."""
    view = memoryview(expressions)
    at = 0
    while at + 4 <= len(view):
        length, _ = struct.unpack_from("=HH", view, at)
        if length < 4:
            break
        attrs = attributes(view[at + 4 : at + length])
        if attrs.get(1, b"").rstrip(b"\0") == b"counter":
            return int.from_bytes(attributes(memoryview(attrs.get(2, b""))).get(2, b""))
        at += (length + 3) & ~3
    return 0


# what rules of all kinds did to packets


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


def patterns(version: int, token: bytes, form: Encapsulation | None, prefix: str = "") -> list[Pattern]:
    """Return what the packets of a trace look like to a filter: bare, quoted in an ICMP error, and in a tunnel."""
    echo, error = offsets(version)
    request, reply = (b"\x08", b"\x00") if version == 4 else (b"\x80", b"\x81")
    kinds = [("out", echo, request), ("back", echo, reply), ("error", error, request)]
    found = [Pattern(prefix + name, ((at - 8, kind), (at, token))) for name, at, kind in kinds]
    if form is not None:
        found += [
            Pattern(f"tunnel {name}", ((form.inner + at - 8, kind), (form.inner + at, token)))
            for name, at, kind in kinds[:2]
        ]
    return found


def rule_text(family: str, table: str, chain: str, handle: int) -> str:
    """Return a rule as nft prints it, without its counter; "" where there is none with this handle."""
    for line in (output("nft", "-a", "list", "chain", family, table, chain) or "").splitlines():
        rule, _, number = line.strip().rpartition(" # handle ")
        if number == str(handle) and rule:
            return re.sub(r" ?counter packets \d+ bytes \d+", "", rule).strip()
    return ""


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
                    where = f"{family} {hook}" + (" (tunnel)" if "tunnel" in name else "")
                    hooks.append(HookCount(where, count.first, count.last, name.endswith("back")))
        suspects = _suspects(output("nft", "list", "ruleset") or "")
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
        table, chain = f"table {printable(f'{verdict.family} {verdict.table}')}", verdict[:3]
        if verdict.handle == 0:
            return Drop(f"policy {verdict.what} of chain {printable(verdict.chain)}", table, chain=chain)
        text = rule_text(verdict.family, verdict.table, verdict.chain, verdict.handle)
        text = printable(text or f"rule {verdict.handle}", _LONGEST)
        return Drop(f"`{text}` in chain {printable(verdict.chain)}", table, chain=chain)

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
            found.update(dict(_parse(tool, output(*argv) or "")))
        for tool in ("iptables-nft", "ip6tables-nft"):
            found.update(dict(_parse(tool, output(f"{tool}-save", "-c") or "")))
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
    names = [line.removeprefix("table ").strip() for line in (output("nft", "list", "tables") or "").splitlines()]
    found = [name for name in names if "ovsmesh" not in name]
    for tool, path in _LEGACY.items():
        with contextlib.suppress(OSError):
            if path and Path(path).read_text().split():
                found.append(tool)
    return tuple(printable(name) for name in found)
