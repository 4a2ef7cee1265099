"""rtnetlink's bytes: links, addresses, routes, neighbours and FDB entries, both ways.

A thousand peers are three thousand kernel entries: pyroute2 encodes or decodes one in 0.3 ms,
`struct` in 5 µs, which is the difference between 1.3 s and 30 ms at start; and pyroute2's import
alone is 0.2 s and 24 MiB of an agent that may have 60. Knows <linux/rtnetlink.h>, <linux/if_link.h>
and <linux/neighbour.h>; opens no socket and imports nothing of ours.
"""

from __future__ import annotations

import functools
import socket
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

_Entry = TypeVar("_Entry")

NEWLINK, DELLINK, GETLINK, SETLINK = 16, 17, 18, 19
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30
NEWNETCONF, DELNETCONF = 80, 81
ERROR, DONE = 2, 3

REQUEST, ACK, ROOT_MATCH, REPLACE, EXCL, CREATE = 0x1, 0x4, 0x300, 0x100, 0x200, 0x400
MULTI, DUMP_INTR = 0x2, 0x10
AF_BRIDGE = 7
PERMANENT, NOARP = 0x80, 0x40
_MASTER_FLAG = 0x04
_ONLINK = 4
_MAIN = 254
_TYPES = {"unicast": 1, "unreachable": 7}
_TYPE_NAMES = {
    1: "unicast",
    2: "local",
    3: "broadcast",
    5: "multicast",
    6: "blackhole",
    7: "unreachable",
    8: "prohibit",
}
_NODAD = 0x02
_UP = 1
_NESTED = 0x8000
_HAIRPIN = 4
"""IFLA_BRPORT_MODE."""
_NOISE = (8, 9, 27, 30)
"""IFLA_BRPORT_ LEARNING, UNICAST_FLOOD, MCAST_FLOOD, BCAST_FLOOD."""

_HEADER = struct.Struct("=IHHII")
_RTMSG = struct.Struct("=BBBBBBBBI")
_NDMSG = struct.Struct("=BxHiHBB")
_IFADDR = struct.Struct("=BBBBI")
_IFINFO = struct.Struct("=BxHiII")
_ATTR = struct.Struct("=HH")
_U32 = struct.Struct("=I")


class RouteEntry(NamedTuple):
    """A route as the kernel has it; addresses as text, `oif` a link's index, 0 for none."""

    dst: str
    metric: int
    type: str
    via: str
    oif: int
    mtu: int
    protocol: int
    table: int


class NeighbourEntry(NamedTuple):
    """A neighbour (family 2 or 10) or FDB entry (family 7, `dst` empty)."""

    family: int
    dst: str
    mac: str
    ifindex: int
    state: int
    protocol: int
    master: int


class AddressEntry(NamedTuple):
    """An address ADDRESS/PREFIXLEN on the link `ifindex`."""

    address: str
    ifindex: int
    protocol: int


class LinkEntry(NamedTuple):
    """A network device. MTU in bytes. `quiet` is a bridge port that neither learns nor is flooded to;
    `hairpin` is one that is sent back what comes from it."""

    ifindex: int
    name: str
    kind: str
    mtu: int
    up: bool
    master: int
    mac: str
    alias: str
    quiet: bool
    family: int
    hairpin: bool = False


class Message(NamedTuple):
    """One netlink message: its type, flags, sequence number and payload."""

    type: int
    flags: int
    seq: int
    payload: memoryview


def _attr(kind: int, value: bytes) -> bytes:
    return _ATTR.pack(4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _pack(kind: int, flags: int, seq: int, payload: bytes) -> bytes:
    return _HEADER.pack(16 + len(payload), kind, flags | REQUEST, seq, 0) + payload


def _packed(address: str) -> tuple[int, bytes]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.inet_pton(family, address)


def _mac(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def route(kind: int, flags: int, seq: int, entry: RouteEntry) -> bytes:
    """A NEWROUTE or DELROUTE message for the main table; a gateway is taken as on-link."""
    address, _, length = entry.dst.partition("/")
    family, packed = _packed(address)
    onlink = _ONLINK if entry.via else 0
    body = _RTMSG.pack(family, int(length), 0, 0, _MAIN, entry.protocol, 0, _TYPES[entry.type], onlink)
    body += _attr(1, packed) + _attr(6, _U32.pack(entry.metric))
    if entry.oif:
        body += _attr(4, _U32.pack(entry.oif))
    if entry.via:
        body += _attr(5, _packed(entry.via)[1])
    if entry.mtu:
        body += _attr(8, _attr(2, _U32.pack(entry.mtu)))
    return _pack(kind, flags, seq, body)


def neighbour(kind: int, flags: int, seq: int, entry: NeighbourEntry) -> bytes:
    """A NEWNEIGH or DELNEIGH message for a neighbour or, in family AF_BRIDGE, a bridge's FDB entry."""
    family = AF_BRIDGE if entry.family == AF_BRIDGE else _packed(entry.dst)[0]
    body = _NDMSG.pack(family, 0, entry.ifindex, entry.state, _MASTER_FLAG if family == AF_BRIDGE else 0, 0)
    if entry.dst:
        body += _attr(1, _packed(entry.dst)[1])
    body += _attr(2, _mac(entry.mac))
    if entry.protocol:
        body += _attr(12, bytes([entry.protocol]))
    return _pack(kind, flags, seq, body)


def address(kind: int, flags: int, seq: int, entry: AddressEntry) -> bytes:
    """A NEWADDR or DELADDR message. IPv6 skips duplicate detection: the mesh has settled who owns it."""
    text, _, length = entry.address.partition("/")
    family, packed = _packed(text)
    nodad = _NODAD if family == socket.AF_INET6 else 0
    body = _IFADDR.pack(family, int(length), nodad, 0, entry.ifindex) + _attr(2, packed) + _attr(1, packed)
    if entry.protocol:
        body += _attr(11, bytes([entry.protocol]))
    return _pack(kind, flags, seq, body)


def dump(kind: int, seq: int, family: int) -> bytes:
    """A request for all entries of GETROUTE, GETNEIGH or GETADDR in an address family."""
    body = {GETROUTE: _RTMSG.size, GETNEIGH: _NDMSG.size, GETADDR: _IFADDR.size, GETLINK: _IFINFO.size}[kind]
    return _pack(kind, ROOT_MATCH, seq, bytes([family]).ljust(body, b"\0"))


def messages(data: bytes) -> Iterator[Message]:
    """Splits what one read of a netlink socket returned; stops at the first malformed header."""
    view = memoryview(data)
    at = 0
    while at + 16 <= len(view):
        length, kind, flags, seq, _ = _HEADER.unpack_from(view, at)
        if length < 16 or at + length > len(view):
            return
        yield Message(kind, flags, seq, view[at + 16 : at + length])
        at += (length + 3) & ~3


def _attrs(view: memoryview, at: int) -> dict[int, bytes]:
    found = {}
    end = len(view)
    while at + 4 <= end:
        length, kind = _ATTR.unpack_from(view, at)
        if length < 4 or at + length > end:
            break
        found[kind & 0x3FFF] = bytes(view[at + 4 : at + length])
        at += (length + 3) & ~3
    return found


def error_of(message: Message) -> int:
    """The errno of an ERROR message, 0 for an acknowledgement."""
    return -int(struct.unpack_from("=i", message.payload)[0])


def _whole(parse: Callable[[memoryview], _Entry | None]) -> Callable[[memoryview], _Entry | None]:
    """A parser that has None for what is cut off or garbled, which the kernel does not send."""

    @functools.wraps(parse)
    def parsed(payload: memoryview) -> _Entry | None:
        try:
            return parse(payload)
        except (struct.error, ValueError, IndexError):
            return None

    return parsed


@_whole
def parse_route(payload: memoryview) -> RouteEntry | None:
    """A route, or None for other families, cached ones and tables that are not unicast routing."""
    family, length, _, _, table, protocol, _, kind, flags = _RTMSG.unpack_from(payload)
    if family not in (socket.AF_INET, socket.AF_INET6) or flags & 0x200:
        return None
    attrs = _attrs(payload, _RTMSG.size)
    if 15 in attrs:
        table = _U32.unpack(attrs[15])[0]
    packed = attrs.get(1) or b"\0" * (4 if family == socket.AF_INET else 16)
    mtu = _attrs(memoryview(attrs[8]), 0).get(2) if 8 in attrs else None
    return RouteEntry(
        f"{socket.inet_ntop(family, packed)}/{length}",
        _U32.unpack(attrs[6])[0] if 6 in attrs else 0,
        _TYPE_NAMES.get(kind, str(kind)),
        socket.inet_ntop(family, attrs[5]) if len(attrs.get(5, b"")) in (4, 16) else "",
        _U32.unpack(attrs[4])[0] if 4 in attrs else 0,
        _U32.unpack(mtu)[0] if mtu else 0,
        protocol,
        table,
    )


@_whole
def parse_neighbour(payload: memoryview) -> NeighbourEntry | None:
    """A neighbour or FDB entry, or None for other families."""
    family, _, ifindex, state, _, _ = _NDMSG.unpack_from(payload)
    if family not in (socket.AF_INET, socket.AF_INET6, AF_BRIDGE):
        return None
    attrs = _attrs(payload, _NDMSG.size)
    dst = attrs.get(1, b"")
    return NeighbourEntry(
        family,
        socket.inet_ntop(family, dst) if family != AF_BRIDGE and len(dst) in (4, 16) else "",
        attrs.get(2, b"").hex(":"),
        ifindex,
        state,
        attrs[12][0] if attrs.get(12) else 0,
        _U32.unpack(attrs[9])[0] if 9 in attrs else 0,
    )


@_whole
def parse_address(payload: memoryview) -> AddressEntry | None:
    """An address, or None for other families."""
    family, length, _, _, ifindex = _IFADDR.unpack_from(payload)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    attrs = _attrs(payload, _IFADDR.size)
    packed = attrs.get(2) or attrs.get(1, b"")
    text = socket.inet_ntop(family, packed)
    return AddressEntry(f"{text}/{length}", ifindex, attrs[11][0] if attrs.get(11) else 0)


@_whole
def parse_link(payload: memoryview) -> LinkEntry | None:
    """A link, from a reply or a notification of any family."""
    family, _, ifindex, flags, _ = _IFINFO.unpack_from(payload)
    attrs = _attrs(payload, _IFINFO.size)
    info = _attrs(memoryview(attrs.get(18, b"")), 0)
    # of a bridge's port: in a message about the link, and in one about the port alone
    port = _attrs(memoryview(info.get(5, b"") if family != AF_BRIDGE else attrs.get(12, b"")), 0)
    return LinkEntry(
        ifindex,
        _text(attrs.get(3, b"")),
        _text(info.get(1, b"")),
        _U32.unpack(attrs[4])[0] if 4 in attrs else 0,
        bool(flags & _UP),
        _U32.unpack(attrs[10])[0] if 10 in attrs else 0,
        attrs.get(1, b"").hex(":"),
        _text(attrs.get(20, b"")),
        bool(port) and not any(port.get(flag, b"\0")[0] for flag in _NOISE),
        family,
        port.get(_HAIRPIN, b"\0")[0] != 0,
    )


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


def new_bridge(seq: int, name: str, mac: str, mtu: int) -> bytes:
    """A message that makes a Linux bridge, down."""
    body = (
        _IFINFO.pack(0, 0, 0, 0, 0) + _attr(3, name.encode() + b"\0") + _attr(1, _mac(mac)) + _attr(4, _U32.pack(mtu))
    )
    body += _attr(18, _attr(1, b"bridge"))
    return _pack(NEWLINK, CREATE | EXCL, seq, body)


def set_link(
    seq: int,
    ifindex: int,
    *,
    name: str = "",
    alias: str = "",
    mac: str = "",
    mtu: int = 0,
    up: bool | None = None,
    master: int | None = None,
) -> bytes:
    """A message that changes what is given of a link; a master of 0 frees it."""
    body = _IFINFO.pack(0, 0, ifindex, _UP if up else 0, 0 if up is None else _UP)
    if name:
        body += _attr(3, name.encode() + b"\0")
    if alias:
        body += _attr(20, alias.encode())
    if mac:
        body += _attr(1, _mac(mac))
    if mtu:
        body += _attr(4, _U32.pack(mtu))
    if master is not None:
        body += _attr(10, _U32.pack(master))
    return _pack(SETLINK if not name else NEWLINK, 0, seq, body)


def quiet_port(seq: int, ifindex: int) -> bytes:
    """A message that stops a bridge port from learning and from being flooded to."""
    flags = b"".join(_attr(flag, b"\0") for flag in _NOISE)
    return _pack(SETLINK, 0, seq, _IFINFO.pack(AF_BRIDGE, 0, ifindex, 0, 0) + _attr(12 | _NESTED, flags))


def hairpin_port(seq: int, ifindex: int) -> bytes:
    """A message that has a bridge port sent back what comes from it."""
    return _pack(
        SETLINK, 0, seq, _IFINFO.pack(AF_BRIDGE, 0, ifindex, 0, 0) + _attr(12 | _NESTED, _attr(_HAIRPIN, b"\1"))
    )


def del_link(seq: int, ifindex: int) -> bytes:
    """A message that deletes a link."""
    return _pack(DELLINK, 0, seq, _IFINFO.pack(0, 0, ifindex, 0, 0))


def get_link(seq: int, ifindex: int) -> bytes:
    """A request for one link."""
    return _pack(GETLINK, 0, seq, _IFINFO.pack(0, 0, ifindex, 0, 0))
