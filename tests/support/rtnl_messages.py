"""Netlink messages as the kernel would send them, of one host that is wired, for the tests of the cache."""

from __future__ import annotations

from typing import Any

from ovsmesh.dataplane.types import KBR, MARK, OBR, Route
from ovsmesh.linux import rtnetlink

ETH0, KBR_INDEX, OBR_INDEX, POD = 2, 4, 5, 6
PEER_MAC = "0a:58:0a:61:02:01"
OURS = Route("unicast", "10.97.2.1", KBR, 1462)
DST = ("10.97.2.0/24", 111)


def message(kind: Any, data: Any) -> Any:
    (found,) = rtnetlink.messages(data)
    return found._replace(type=kind)


def link(
    index: Any,
    name: Any,
    gone: Any = False,
    kind: Any = "",
    mtu: Any = 1500,
    up: Any = True,
    master: Any = 0,
    mac: Any = "",
    alias: Any = "",
    quiet: Any = False,
    family: Any = 0,
    hairpin: Any = False,
) -> Any:
    attr = rtnetlink._attr
    body = rtnetlink._IFINFO.pack(family, 1, index, int(up), 0) + attr(3, name.encode() + b"\0")
    body += attr(4, mtu.to_bytes(4, "little")) + (attr(10, master.to_bytes(4, "little")) if master else b"")
    body += attr(1, rtnetlink._mac(mac)) + attr(20, alias.encode())
    info = attr(1, kind.encode() + b"\0")
    if master:
        port = b"".join(attr(flag, bytes([not quiet])) for flag in (8, 9, 27, 30)) + attr(4, bytes([hairpin]))
        info += attr(5, port)
        body += attr(12, port) if family else b""
    return message(rtnetlink.DELLINK if gone else rtnetlink.NEWLINK, rtnetlink._pack(16, 0, 1, body + attr(18, info)))


def kbr(index: Any = KBR_INDEX, **changes: Any) -> Any:
    return link(index, KBR, **{"kind": "bridge", "mtu": 1462, "mac": "0a:58:0a:61:01:01", "alias": MARK, **changes})


def obr(**changes: Any) -> Any:
    return link(OBR_INDEX, OBR, **{"kind": "tun", "mtu": 1462, "master": KBR_INDEX, "quiet": True, **changes})


def pod(**changes: Any) -> Any:
    return link(POD, "veth1", **{"kind": "veth", "master": KBR_INDEX, **changes})


def route(
    dst: Any = DST[0],
    metric: Any = 111,
    gone: Any = False,
    type: Any = "unicast",
    via: Any = "10.97.2.1",
    oif: Any = KBR_INDEX,
    mtu: Any = 1462,
    protocol: Any = 111,
    flags: Any = rtnetlink.CREATE,
) -> Any:
    entry = rtnetlink.RouteEntry(dst, metric, type, via, oif, mtu, protocol, 254)
    data = rtnetlink.route(rtnetlink.NEWROUTE, flags, 1, entry)
    return message(rtnetlink.DELROUTE if gone else rtnetlink.NEWROUTE, data)


def replaced(**route_: Any) -> Any:
    """As `ip route replace` is told: the new route, and by a flag alone that an old one went (Linux, measured)."""
    return route(**route_, flags=rtnetlink.REPLACE)


def neighbour(
    dst: Any = "10.97.2.1",
    mac: Any = PEER_MAC,
    gone: Any = False,
    index: Any = KBR_INDEX,
    state: Any = rtnetlink.PERMANENT,
    protocol: Any = 111,
) -> Any:
    entry = rtnetlink.NeighbourEntry(0, dst, mac, index, state, protocol, 0)
    return message(
        rtnetlink.DELNEIGH if gone else rtnetlink.NEWNEIGH, rtnetlink.neighbour(rtnetlink.NEWNEIGH, 0, 1, entry)
    )


def fdb(
    mac: Any = PEER_MAC,
    gone: Any = False,
    index: Any = OBR_INDEX,
    state: Any = rtnetlink.NOARP,
    master: Any = KBR_INDEX,
) -> Any:
    attr = rtnetlink._attr
    body = (
        rtnetlink._NDMSG.pack(7, 0, index, state, 0, 0)
        + attr(2, rtnetlink._mac(mac))
        + attr(9, master.to_bytes(4, "little"))
    )
    return message(rtnetlink.DELNEIGH if gone else rtnetlink.NEWNEIGH, rtnetlink._pack(28, 0, 1, body))


def address(text: Any = "10.97.1.1/24", gone: Any = False, index: Any = KBR_INDEX, protocol: Any = 111) -> Any:
    data = rtnetlink.address(rtnetlink.NEWADDR, 0, 1, rtnetlink.AddressEntry(text, index, protocol))
    return message(rtnetlink.DELADDR if gone else rtnetlink.NEWADDR, data)
