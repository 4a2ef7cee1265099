"""Encode the netlink messages that ovsmesh sends, with pyroute2's message classes.

pyroute2 takes 0.1 to 0.3 ms a message, and a thousand peers are three thousand routes, neighbours and
FDB entries. So each shape of those is encoded once; addresses, MACs and numbers are then written at
the offsets that pyroute2 gave them. Sequence numbers are 0: the socket sets them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import socket
import struct
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from ipaddress import ip_address
from typing import Any, TypeVar

from ovsmesh.errors import OvsmeshError
from ovsmesh.linux import rtnetlink
from ovsmesh.linux.rtnetlink import AddressEntry, NeighbourEntry, RouteEntry
from ovsmesh.mesh.types import IPAddress

_Entry = TypeVar("_Entry", RouteEntry, NeighbourEntry)


@contextlib.contextmanager
def _without_package_init() -> Iterator[None]:
    """Import modules of pyroute2 without running `pyroute2/__init__.py`.

    That file imports every protocol that the library knows: 150 ms and 10.7 MiB, of which the message
    classes are 20 ms and 0.8 MiB (0.9.7, in an agent). `import pyroute2` elsewhere works as usual.
    """
    spec = None if "pyroute2" in sys.modules else importlib.util.find_spec("pyroute2")
    if spec is None:
        # already imported, or not installed; then the import below tells
        yield
        return
    package = types.ModuleType("pyroute2")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["pyroute2"] = package
    try:
        yield
    finally:
        del sys.modules["pyroute2"]


with _without_package_init():
    from pyroute2.netlink import ctrlmsg
    from pyroute2.netlink.rtnl.fibmsg import fibmsg
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
    from pyroute2.netlink.rtnl.ndmsg import ndmsg
    from pyroute2.netlink.rtnl.nsidmsg import nsidmsg
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

_bridge_data = ifinfmsg.ifinfo.bridge_data
if len(_bridge_data.nla_map) == 45:
    # pyroute2 0.9.7 ends at 44, and numbers attributes by their place
    _bridge_data.nla_map += (
        ("IFLA_BR_VLAN_STATS_PER_PORT", "uint8"),
        ("IFLA_BR_MULTI_BOOLOPT", "hex"),
        ("IFLA_BR_MCAST_QUERIER_STATE", "hex"),
        ("IFLA_BR_FDB_N_LEARNED", "uint32"),
        ("IFLA_BR_FDB_MAX_LEARNED", "uint32"),
    )
_REQUEST, _DUMP = 0x1, 0x300
_CONTROL, _GETFAMILY = 16, 3
"""GENL_ID_CTRL, CTRL_CMD_GETFAMILY."""
_ONLINK, _MASTER, _NODAD, _UP = 0x4, 0x4, 0x2, 0x1
"""RTNH_F_ONLINK, NTF_MASTER, IFA_F_NODAD, IFF_UP."""
_NESTED = 0x8000
_ROUTE_TYPES = {name: number for number, name in rtnetlink.ROUTE_TYPES.items()}
_HEADER_BYTES, _ATTRIBUTE_HEADER_BYTES = 16, 4
_u32 = struct.Struct("=I").pack
_DUMP_CLASSES = {
    rtnetlink.GETLINK: ifinfmsg,
    rtnetlink.GETADDR: ifaddrmsg,
    rtnetlink.GETROUTE: rtmsg,
    rtnetlink.GETNEIGH: ndmsg,
    rtnetlink.GETRULE: fibmsg,
}

_ADVICE = "install the version that ovsmesh requires"

Message = Any
"""A message object of pyroute2, which ships no types."""
Attributes = list[tuple[Any, ...]]


def route(type_: int, flags: int, entry: RouteEntry) -> bytes:
    """Return a NEWROUTE or DELROUTE message for the main table. A gateway is taken as on-link."""
    address, _, length = entry.dst.partition("/")
    family, packed = _packed(address)
    fields = {"dst_len": bytes((int(length),)), "RTA_DST": packed}
    if entry.via:
        fields["RTA_GATEWAY"] = _packed(entry.via)[1]
    fields["RTA_PRIORITY"] = _u32(entry.metric)
    if entry.oif:
        fields["RTA_OIF"] = _u32(entry.oif)
    if entry.mtu:
        fields["RTAX_MTU"] = _u32(entry.mtu)
    shape = (type_, flags, family, entry.type, entry.protocol, *fields)
    template = _templates.get(shape)
    if template is None:
        template = _new_template(shape, functools.partial(_route, type_, flags), entry, fields)
    return template.fill(fields.values())


def neighbour(type_: int, flags: int, entry: NeighbourEntry) -> bytes:
    """Return a NEWNEIGH or DELNEIGH message for a neighbour or, in family AF_BRIDGE, an FDB entry of a bridge."""
    fields = {"ifindex": _u32(entry.ifindex)}
    family = entry.family
    if entry.dst:
        family, fields["NDA_DST"] = _packed(entry.dst)
    fields["NDA_LLADDR"] = bytes.fromhex(entry.mac.replace(":", ""))
    shape = (type_, flags, family, entry.state, entry.protocol, entry.sticky, *fields)
    template = _templates.get(shape)
    if template is None:
        template = _new_template(shape, functools.partial(_neighbour, type_, flags), entry, fields)
    return template.fill(fields.values())


def address(type_: int, flags: int, entry: AddressEntry) -> bytes:
    """Return a NEWADDR or DELADDR message.

    IPv6 skips duplicate detection: the mesh has settled who has the address.
    """
    text, _, length = entry.address.partition("/")
    family, _ = _packed(text)
    fields = {
        "family": family,
        "prefixlen": int(length),
        "flags": _NODAD if family == socket.AF_INET6 else 0,
        "index": entry.ifindex,
    }
    attributes: Attributes = [("IFA_LOCAL", text), ("IFA_ADDRESS", text)]
    attributes += [("IFA_PROTO", entry.protocol)] if entry.protocol else []
    return _bytes(ifaddrmsg, type_, flags, fields, attributes)


def dump(type_: int, family: int, **fields: int) -> bytes:
    """Return a request for all entries of GETLINK, GETADDR, GETROUTE, GETNEIGH or GETRULE in an address family."""
    return _bytes(_DUMP_CLASSES[type_], type_, _DUMP, {"family": family, **fields})


def dump_fdb(port: int) -> bytes:
    """Return a request for the FDB entries of one bridge port."""
    # as the header of a link: the kernel ignores the port in a neighbour's, unless it is asked to be strict
    return _bytes(ifinfmsg, rtnetlink.GETNEIGH, _DUMP, {"family": rtnetlink.AF_BRIDGE, "index": port})


def dump_filters(ifindex: int, parent: int) -> bytes:
    """Return a request for the tc filters of a link."""
    with _without_package_init():
        # all queueing disciplines come with it: 30 ms that an agent has no use for
        from pyroute2.netlink.rtnl.tcmsg import tcmsg
    return _bytes(tcmsg, rtnetlink.GETTFILTER, _DUMP, {"index": ifindex, "parent": parent})


def get_route(target: IPAddress, source: IPAddress | None = None, iif: int = 0, mark: int = 0, flags: int = 0) -> bytes:
    """Return a request for the route that a packet takes; with `iif`, one that arrives on that link.

    `flags` are RTM_F_ flags.
    """
    return bytes(_get_route(target, source, iif, mark, flags).data)


def get_forwarding_route(target: IPAddress, source: IPAddress, iif: int) -> bytes:
    """Return the same as get_route() does for a packet that arrives on a link: for every probe that is sent."""
    values = (target.packed, source.packed, _u32(iif))
    shape = (rtnetlink.GETROUTE, target.version)
    template = _templates.get(shape)
    if template is None:
        other = _OTHER_ADDRESSES[target.version]
        template = _Template(_get_route(other, other, _OTHER_NUMBERS["oif"]), ("RTA_DST", "RTA_SRC", "RTA_IIF"))
        _check(template, values, get_route(target, source, iif), "request for a route")
        _templates[shape] = template
    return template.fill(values)


def get_output_route(target: IPAddress, source: IPAddress, flags: int) -> bytes:
    """Return the same as get_route() does for a packet of this host itself: for every peer that there is."""
    values = (target.packed, source.packed)
    shape = (rtnetlink.GETROUTE, target.version, flags)
    template = _templates.get(shape)
    if template is None:
        other = _OTHER_ADDRESSES[target.version]
        template = _Template(_get_route(other, other, flags=flags), ("RTA_DST", "RTA_SRC"))
        _check(template, values, get_route(target, source, flags=flags), "request for a route")
        _templates[shape] = template
    return template.fill(values)


def get_namespace_number(fd: int) -> bytes:
    """Return a request for the number that a network namespace has in the socket's own."""
    return _bytes(nsidmsg, rtnetlink.GETNSID, 0, {}, [("NETNSA_FD", fd)])


def new_bridge(name: str, mac: str, mtu: int) -> bytes:
    """Return a message that creates a Linux bridge, down."""
    attributes: Attributes = [("IFLA_ADDRESS", mac), ("IFLA_MTU", mtu), ("IFLA_IFNAME", name)]
    attributes += [("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "bridge")]})]
    return _bytes(ifinfmsg, rtnetlink.NEWLINK, rtnetlink.CREATE | rtnetlink.EXCL, {}, attributes)


def limit_learning(ifindex: int, learned_max: int) -> bytes:
    """Return a message that limits how many MACs a bridge learns. Kernels before 6.7 take it, and set nothing."""
    data = {"attrs": [("IFLA_BR_FDB_MAX_LEARNED", learned_max)]}
    info = {"attrs": [("IFLA_INFO_KIND", "bridge"), ("IFLA_INFO_DATA", data)]}
    return _bytes(ifinfmsg, rtnetlink.NEWLINK, 0, {"index": ifindex}, [("IFLA_LINKINFO", info)])


def set_link(
    ifindex: int,
    *,
    name: str = "",
    alias: str = "",
    mac: str = "",
    mtu: int = 0,
    up: bool | None = None,
    master: int | None = None,
) -> bytes:
    """Return a message that changes what is given of a link. A master of 0 releases it."""
    given = {
        "IFLA_IFNAME": name or None,
        "IFLA_IFALIAS": alias or None,
        "IFLA_ADDRESS": mac or None,
        "IFLA_MTU": mtu or None,
        "IFLA_MASTER": master,
    }
    fields = {"index": ifindex, "flags": _UP if up else 0, "change": 0 if up is None else _UP}
    return _bytes(ifinfmsg, rtnetlink.NEWLINK, 0, fields, [(k, v) for k, v in given.items() if v is not None])


def quiet_port(ifindex: int) -> bytes:
    """Return a message that stops a bridge port from learning and from being flooded to."""
    return _bridge_port(ifindex, dict.fromkeys(("UNICAST_FLOOD", "MCAST_FLOOD", "BCAST_FLOOD", "LEARNING"), 0))


def hairpin_port(ifindex: int) -> bytes:
    """Return a message that lets a bridge port be sent back what it sent."""
    return _bridge_port(ifindex, {"MODE": 1})


def _bridge_port(ifindex: int, settings: Mapping[str, int]) -> bytes:
    attributes = [(f"IFLA_BRPORT_{name}", value) for name, value in settings.items()]
    fields = {"family": rtnetlink.AF_BRIDGE, "index": ifindex}
    return _bytes(ifinfmsg, rtnetlink.SETLINK, 0, fields, [("IFLA_PROTINFO", {"attrs": attributes}, _NESTED)])


def del_link(ifindex: int) -> bytes:
    """Return a message that deletes a link."""
    return _bytes(ifinfmsg, rtnetlink.DELLINK, 0, {"index": ifindex})


def get_link(ifindex: int) -> bytes:
    """Return a request for one link."""
    return _bytes(ifinfmsg, rtnetlink.GETLINK, 0, {"index": ifindex})


def get_genl_family(name: str) -> bytes:
    """Return a request for a generic netlink family, as <linux/genetlink.h> has it."""
    return _bytes(ctrlmsg, _CONTROL, 0, {"cmd": _GETFAMILY, "version": 1}, [("CTRL_ATTR_FAMILY_NAME", name)])


def _packed(address: str) -> tuple[int, bytes]:
    """Return an address's family and bytes."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.inet_pton(family, address)


# full encodings


def _encode(
    class_: type, type_: int, flags: int, fields: Mapping[str, int], attributes: Iterable[tuple[Any, ...]] = ()
) -> Message:
    message: Message = class_()
    message.update(fields)
    message["attrs"] = list(attributes)
    message["header"].update(type=type_, flags=flags | _REQUEST)
    message.encode()
    # pyroute2 leaves out attributes that it does not have; what it encoded is no longer a tuple
    if missing := [slot[0] for slot in message["attrs"] if isinstance(slot, tuple)]:
        raise OvsmeshError(f"this version of pyroute2 does not have {missing[0]}; {_ADVICE}")
    return message


def _bytes(*parts: Any) -> bytes:
    return bytes(_encode(*parts).data)


def _route(type_: int, flags: int, entry: RouteEntry) -> Message:
    address, _, length = entry.dst.partition("/")
    fields = {
        "family": _packed(address)[0],
        "dst_len": int(length),
        "table": rtnetlink.MAIN_TABLE,
        "proto": entry.protocol,
        "type": _ROUTE_TYPES[entry.type],
        "flags": _ONLINK if entry.via else 0,
    }
    attributes: Attributes = [("RTA_DST", address)]
    attributes += [("RTA_GATEWAY", entry.via)] if entry.via else []
    attributes += [("RTA_PRIORITY", entry.metric)]
    attributes += [("RTA_OIF", entry.oif)] if entry.oif else []
    attributes += [("RTA_METRICS", {"attrs": [("RTAX_MTU", entry.mtu)]})] if entry.mtu else []
    return _encode(rtmsg, type_, flags, fields, attributes)


def _get_route(target: IPAddress, source: IPAddress | None, iif: int = 0, mark: int = 0, flags: int = 0) -> Message:
    bits = target.max_prefixlen
    family = socket.AF_INET if target.version == 4 else socket.AF_INET6
    fields = {"family": family, "dst_len": bits, "src_len": bits if source else 0, "flags": flags}
    attributes: Attributes = [("RTA_DST", str(target))]
    attributes += [("RTA_SRC", str(source))] if source else []
    attributes += [("RTA_IIF", iif)] if iif else []
    attributes += [("RTA_MARK", mark)] if mark else []
    return _encode(rtmsg, rtnetlink.GETROUTE, 0, fields, attributes)


def _neighbour(type_: int, flags: int, entry: NeighbourEntry) -> Message:
    fields = {
        "family": _packed(entry.dst)[0] if entry.dst else entry.family,
        "ifindex": entry.ifindex,
        "state": entry.state,
        "flags": (_MASTER if entry.family == rtnetlink.AF_BRIDGE else 0) | (rtnetlink.STICKY if entry.sticky else 0),
    }
    attributes: Attributes = [("NDA_PROTOCOL", entry.protocol)] if entry.protocol else []
    attributes += [("NDA_DST", entry.dst)] if entry.dst else []
    attributes += [("NDA_LLADDR", entry.mac)]
    return _encode(ndmsg, type_, flags, fields, attributes)


# templates


class _Template:
    """An encoded message, ready for other values in some of its fields."""

    def __init__(self, message: Message, fields: Iterable[str]) -> None:
        data = bytes(message.data)
        places = _places(message)
        self._parts: list[bytes] = []
        end = 0
        for field in fields:
            start, size = places[field]
            self._parts += [data[end:start], data[start : start + size]]
            end = start + size
        self._parts.append(data[end:])

    def fill(self, values: Iterable[bytes]) -> bytes:
        """Return the message with these values, given in the order of the fields."""
        parts = self._parts.copy()
        parts[1::2] = values
        return b"".join(parts)


def _places(message: Message) -> dict[str, tuple[int, int]]:
    """Return the offset and size of each header field and attribute, nested ones included."""
    found = {}
    offset = _HEADER_BYTES
    for name, form in message.fields:
        size = struct.calcsize("=" + form)
        found[name] = offset, size
        offset += size
    slots = list(message["attrs"])
    for slot in slots:
        name, attribute = slot.cell
        found[name] = attribute.offset + _ATTRIBUTE_HEADER_BYTES, attribute.length - _ATTRIBUTE_HEADER_BYTES
        slots += attribute["attrs"]
    return found


_templates: dict[tuple[Any, ...], _Template] = {}
_OTHER_NUMBERS = {"metric": 0x5A5A5A5A, "oif": 0x5B5B, "mtu": 0x5C5C, "ifindex": 0x5D5D}
_OTHER_MAC = "5a:5b:5c:5d:5e:5f"
_OTHER_ADDRESSES: dict[int, IPAddress] = {4: ip_address("203.0.113.91"), 6: ip_address("2001:db8:5a5b::5c5d")}


def _other(entry: _Entry) -> _Entry:
    """Return an entry of the same shape that differs wherever a template can be filled in."""
    changed: dict[str, Any] = {}
    for name, value in entry._asdict().items():
        if name in ("dst", "via") and value:
            length = "/9" if "/" in value else ""
            changed[name] = f"{_OTHER_ADDRESSES[6 if ':' in value else 4]}{length}"
        elif name in _OTHER_NUMBERS and value:
            changed[name] = _OTHER_NUMBERS[name]
        elif name == "mac":
            changed[name] = _OTHER_MAC
    return entry._replace(**changed)


def _new_template(
    shape: tuple[Any, ...], encode: Callable[[_Entry], Message], entry: _Entry, fields: Mapping[str, bytes]
) -> _Template:
    """Return the template of a shape, made from another entry of it and checked against `entry`.

    Raise OvsmeshError if filling it in gives other bytes than `encode` does.
    """
    template = _Template(encode(_other(entry)), fields)
    _check(template, fields.values(), bytes(encode(entry).data), type(entry).__name__)
    _templates[shape] = template
    return template


def _check(template: _Template, values: Iterable[bytes], whole: bytes, what: str) -> None:
    if template.fill(values) != whole:
        raise OvsmeshError(f"this version of pyroute2 encodes a {what} in a way that can't be filled in; {_ADVICE}")
