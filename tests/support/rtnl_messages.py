"""Netlink messages as the kernel sends them, about one host that is wired, for the tests of the cache."""

from __future__ import annotations

from typing import Any

from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg

from ovsmesh.dataplane.types import KBR, MARK, OBR, Route
from ovsmesh.linux import netlink_socket, rtnetlink
from ovsmesh.linux import rtnetlink_encoder as encoder

ETH0, KBR_INDEX, OBR_INDEX, POD = 2, 4, 5, 6
PEER_MAC = "0a:58:0a:61:02:01"
PEER_ROUTE = Route("unicast", "10.97.2.1", KBR, 1462)
DST = ("10.97.2.0/24", 111)


def built(kind: Any, type_: int, fields: dict[str, int], *attributes: Any) -> bytes:
    """A message as pyroute2 makes it."""
    message = kind()
    message.update(fields)
    message["attrs"] = list(attributes)
    message["header"]["type"] = type_
    message.encode()
    return bytes(message.data)


def message(kind: Any, data: Any) -> Any:
    (found,) = netlink_socket.messages(data)
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
    info: list[Any] = [("IFLA_INFO_KIND", kind)]
    attributes: list[Any] = [("IFLA_IFNAME", name), ("IFLA_MTU", mtu), ("IFLA_IFALIAS", alias)]
    attributes += [("IFLA_ADDRESS", mac)] if mac else []
    if master:
        noise = ("LEARNING", "UNICAST_FLOOD", "MCAST_FLOOD", "BCAST_FLOOD")
        port: list[Any] = [(f"IFLA_BRPORT_{flag}", int(not quiet)) for flag in noise]
        port.append(("IFLA_BRPORT_MODE", int(hairpin)))
        info += [("IFLA_INFO_SLAVE_KIND", "bridge"), ("IFLA_INFO_SLAVE_DATA", {"attrs": port})]
        attributes += [("IFLA_MASTER", master)]
        attributes += [("IFLA_PROTINFO", {"attrs": port})] if family else []
    attributes.append(("IFLA_LINKINFO", {"attrs": info}))
    fields = {"family": family, "index": index, "flags": int(up)}
    return message(rtnetlink.DELLINK if gone else rtnetlink.NEWLINK, built(ifinfmsg, 16, fields, *attributes))


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
    data = encoder.route(rtnetlink.NEWROUTE, flags, entry)
    return message(rtnetlink.DELROUTE if gone else rtnetlink.NEWROUTE, data)


def replaced(**route_: Any) -> Any:
    """What the kernel sends for `ip route replace`: the new route, with a flag instead of the end of the old one."""
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
    return message(rtnetlink.DELNEIGH if gone else rtnetlink.NEWNEIGH, encoder.neighbour(rtnetlink.NEWNEIGH, 0, entry))


def fdb(
    mac: Any = PEER_MAC,
    gone: Any = False,
    index: Any = OBR_INDEX,
    state: Any = rtnetlink.NOARP,
    master: Any = KBR_INDEX,
    flags: Any = rtnetlink.STICKY,
) -> Any:
    data = built(
        ndmsg,
        28,
        {"family": rtnetlink.AF_BRIDGE, "ifindex": index, "state": state, "flags": flags},
        ("NDA_LLADDR", mac),
        ("NDA_MASTER", master),
    )
    return message(rtnetlink.DELNEIGH if gone else rtnetlink.NEWNEIGH, data)


def address(text: Any = "10.97.1.1/24", gone: Any = False, index: Any = KBR_INDEX, protocol: Any = 111) -> Any:
    data = encoder.address(rtnetlink.NEWADDR, 0, rtnetlink.AddressEntry(text, index, protocol))
    return message(rtnetlink.DELADDR if gone else rtnetlink.NEWADDR, data)
