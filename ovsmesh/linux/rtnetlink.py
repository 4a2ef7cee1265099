"""The vocabulary of rtnetlink: constants of its headers, and the entries that messages carry.

Numbers and names are those of <linux/netlink.h>, <linux/rtnetlink.h>, <linux/if_link.h> and
<linux/neighbour.h>. `rtnetlink_encoder` turns entries into messages, `rtnetlink_parser` the reverse.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

NEWLINK, DELLINK, GETLINK, SETLINK = 16, 17, 18, 19
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30
NEWRULE, DELRULE, GETRULE = 32, 33, 34
GETTFILTER, GETNSID = 46, 90
NEWNETCONF, DELNETCONF = 80, 81

REPLACE, EXCL, CREATE = 0x100, 0x200, 0x400
"""NLM_F_ flags of requests that add."""

AF_BRIDGE = 7
MAIN_TABLE = 254
_MAIN_PRIORITY = 32766
"""Of the rule that looks it up."""
PERMANENT, NOARP = 0x80, 0x40
"""NUD_ states of a permanent neighbour and of a static FDB entry."""
NODE_MACS = ("0a:58:", "0e:58:")
"""How the MAC of a node begins, see desired.mac."""
STICKY = 0x40
"""NTF_STICKY: an FDB entry that no frame moves to another port. Linux has it since 4.20, and ignores it before."""

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
    """A neighbour (family 2 or 10) or an FDB entry (family 7, `dst` empty), which may be sticky."""

    family: int
    dst: str
    mac: str
    ifindex: int
    state: int
    protocol: int
    master: int
    sticky: bool = False


class AddressEntry(NamedTuple):
    """An address, as ADDRESS/PREFIXLEN, on the link `ifindex`."""

    address: str
    ifindex: int
    protocol: int


class LinkEntry(NamedTuple):
    """A network device. MTU in bytes.

    `quiet`: a bridge port that neither learns nor is flooded to.
    `hairpin`: a bridge port that may be sent back what it sent.
    `learned_max`: how many MACs a bridge learns, 0 for any number; None where the kernel has no such limit.
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
    learned_max: int | None = None


REFUSED_SOURCE = "its source is refused"
"""In the error of a route: it would be answered on another link, which rp_filter refuses."""


class RouteFound(NamedTuple):
    """The route that a kernel picks. Addresses are text, MTU in bytes, 0 for none."""

    type: str = ""
    """As `ip route` writes it; "" where there is none."""
    via: str = ""
    dev: str = ""
    table: int = 254
    mtu: int = 0
    error: str = ""
    """The kernel's word, where it refuses to route."""
    destination: str = ""
    """The range of the table's entry."""

    def __str__(self) -> str:
        if not self.type:
            return self.error or "none"
        words = [f"{self.type} {self.destination}".strip() if self.type != "unicast" else ""]
        words += [f"via {self.via}" if self.via else "", f"dev {self.dev}" if self.dev else ""]
        words += [f"mtu {self.mtu}" if self.mtu else "", f"table {self.table}" if self.table not in (254, 255) else ""]
        return " ".join(filter(None, words)) + (f" ({self.error})" if self.error else "")


class PolicyRule(NamedTuple):
    """A rule of `ip rule`."""

    priority: int
    text: str
    table: int
    action: str
    """"table", "goto", "blackhole", "unreachable", "prohibit"…"""
    matches: bool
    """Whether it matches the packet, as far as addresses, input link and mark tell."""


def deciding(rules: Iterable[PolicyRule], route: RouteFound) -> PolicyRule | None:
    """Return the rule before table main that decides the route of a packet; None where table main does."""
    early = [r for r in rules if r.matches and r.priority < _MAIN_PRIORITY and not (r.priority == 0 and r.table == 255)]
    winner = next((rule for rule in early if rule.action == "table" and rule.table == route.table), None)
    refusing = next((rule for rule in early if rule.action in ("blackhole", "unreachable", "prohibit")), None)
    if route.table in (254, 255) and not (refusing and (route.error or not route.type)):
        return None
    return winner or refusing


class LinkFound(NamedTuple):
    """A link as it is. MTU in bytes."""

    name: str
    number: int
    """Its index."""
    up: bool
    running: bool
    """Whether it has a carrier."""
    mtu: int
    mac: str
    master: str
    peer_index: int
    """Index of the other end of a veth, in its namespace; 0 where it has none."""
    namespace: int | None
    """Number, in this namespace, of the one where the other end is; None where that is this one."""
    kind: str = ""
    port_state: int = 3
    """State of a bridge port: 3 is forwarding (BR_STATE_)."""
    filters: str = ""
    """What else may drop on it: "XDP program", "tc filter"; "" for nothing."""
