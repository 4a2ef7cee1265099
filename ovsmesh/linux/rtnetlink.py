"""The vocabulary of rtnetlink: constants of its headers, and the entries that messages carry.

Numbers and names are those of <linux/netlink.h>, <linux/rtnetlink.h>, <linux/if_link.h> and
<linux/neighbour.h>. `rtnetlink_encoder` turns entries into messages, `rtnetlink_parser` the reverse.
"""

from __future__ import annotations

from typing import NamedTuple

NEWLINK, DELLINK, GETLINK, SETLINK = 16, 17, 18, 19
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30
GETRULE, GETTFILTER, GETNSID = 34, 46, 90
NEWNETCONF, DELNETCONF = 80, 81

REPLACE, EXCL, CREATE = 0x100, 0x200, 0x400
"""NLM_F_ flags of requests that add."""

AF_BRIDGE = 7
MAIN_TABLE = 254
PERMANENT, NOARP = 0x80, 0x40
"""NUD_ states of a permanent neighbour and of a static FDB entry."""

ROUTE_TYPES = {
    1: "unicast",
    2: "local",
    3: "broadcast",
    5: "multicast",
    6: "blackhole",
    7: "unreachable",
    8: "prohibit",
}
"""RTN_ number → name as `ip route` writes it."""


class RouteEntry(NamedTuple):
    """A route. Addresses are text; `oif` is a link's index, 0 for none; MTU in bytes, 0 for none."""

    dst: str
    metric: int
    type: str
    via: str
    oif: int
    mtu: int
    protocol: int
    table: int


class NeighbourEntry(NamedTuple):
    """A neighbour (family 2 or 10) or an FDB entry (family 7, `dst` empty)."""

    family: int
    dst: str
    mac: str
    ifindex: int
    state: int
    protocol: int
    master: int


class AddressEntry(NamedTuple):
    """An address, as ADDRESS/PREFIXLEN, on the link `ifindex`."""

    address: str
    ifindex: int
    protocol: int


class LinkEntry(NamedTuple):
    """A network device. MTU in bytes.

    `quiet`: a bridge port that neither learns nor is flooded to.
    `hairpin`: a bridge port that may be sent back what it sent.
    """

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
