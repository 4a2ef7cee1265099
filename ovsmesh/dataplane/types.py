"""The dataplane as types: what a node's system holds, desired and observed alike.

Everything is frozen. Parts that exist once a peer are NamedTuples of strings: five thousand of them are
compared in every reconcile, and tuples compare in C.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, NamedTuple

from ovsmesh.errors import Problem
from ovsmesh.names import KBR as KBR
from ovsmesh.names import OBR as OBR

MARK = "ovsmesh"
"""Ownership mark: link alias, external_ids key, nft table name."""
PROTOCOL = 111
"""Ownership mark of routes, neighbours and addresses (not assigned in iproute2's rt_protos)."""
COOKIE = 0x6F76736D
"""Ownership mark of OpenFlow entries: "ovsm"."""
ROUTE_METRIC = 111
"""Metric of a route to a peer's pod CIDR."""
FALLBACK_METRIC = 4278198272
"""Metric of the unreachable routes: behind everything that anyone adds on purpose."""

CNI_BIN_DIR = "/opt/cni/bin:/usr/lib/cni:/usr/libexec/cni"
"""Where container runtimes look for CNI plugins: upstream's, Debian's, Fedora's default."""

DEFAULT_OVSDB = "unix:/var/run/openvswitch/db.sock"
DEFAULT_STATE = "/var/lib/ovsmesh"
DEFAULT_LISTEN = "127.0.0.1:9474"


class CniPlugin(NamedTuple):
    """A CNI plugin, as every copy of it that was found answers."""

    name: str
    versions: tuple[str, ...] = ()
    """CNI versions that all copies support."""
    why: str = ""
    """Why it can't be used; "" when it can."""


class CniFacts(NamedTuple):
    """What the CNI conflist depends on."""

    directory: str
    plugins: tuple[CniPlugin, ...]
    kept: str = ""
    """Our conflist as it lies there, where a plugin that it needs is away."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the desired dataplane depends on and only this host can tell."""

    underlay_mtu: int | None = None
    """MTU in bytes of the link that carries self's tunnel address; None when no link does."""
    datapath_type: str = "system"
    """"system" (kernel) or "netdev" (userspace), see host.Host.facts."""
    datapath_carried: bool = True
    """Whether a bridge of the userspace datapath holds the tunnel address; the kernel's needs none."""
    ipv6: bool = True
    """Whether the kernel has IPv6 at all."""
    ra_links: tuple[str, ...] = ()
    """Links whose IPv6 default route came from a router advertisement."""
    forward_drop: tuple[str, ...] = ()
    """"iptables" and/or "ip6tables": whose FORWARD chain holds rules or a policy that may drop."""
    firewall_missing: tuple[str, ...] = ()
    """What this kernel's packet filter or its tools are known not to have, in the words of firewall_rules.within."""
    cni: CniFacts | None = None
    """None: CNI is left alone."""
    docker: str = ""
    """"replace": Docker is to be on kbr0; "keep": it is there, and its file is to say so; "": none of our business."""


class Link(NamedTuple):
    """A network device of ours. MTU in bytes. `master` "" means none."""

    kind: str
    mtu: int
    up: bool = True
    master: str = ""
    mac: str = ""
    """Lower case; "" where we do not mind."""
    quiet: bool = False
    """Bridge port that neither learns nor is flooded to."""
    unmarked: bool = False
    """It has no mark of ours as yet, but our own conflist had the CNI bridge plugin make it."""


class Bridge(NamedTuple):
    """The OVS bridge as its database row holds it."""

    datapath_type: str
    fail_mode: str = "standalone"
    mtu_request: int = 0


class Port(NamedTuple):
    """A tunnel port with its single interface."""

    type: str
    remote: str
    local: str
    key: str
    """"" means none."""
    node: str
    uid: str
    protected: bool = True


class Route(NamedTuple):
    """Value of a route; its key is (destination, metric)."""

    type: str
    """"unicast" or "unreachable"."""
    via: str = ""
    dev: str = ""
    mtu: int = 0


class Rule(NamedTuple):
    """A filter rule: value under the key (tool and family, chain, name)."""

    text: str


RouteKey = tuple[str, int]
RuleKey = tuple[str, str, str]


def _frozen() -> Mapping[Any, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Dataplane:
    """Everything that the agent owns on a node. The same type for desired and observed.

    Each field maps what identifies a part to what it should be. The order of the fields is the
    order in which parts are added; they are removed in reverse.
    """

    bridges: Mapping[str, Bridge] = field(default_factory=_frozen)
    links: Mapping[str, Link] = field(default_factory=_frozen)
    sysctls: Mapping[str, str] = field(default_factory=_frozen)
    """Path below /proc/sys, with slashes → value."""
    addresses: Mapping[str, str] = field(default_factory=_frozen)
    """ADDRESS/PREFIXLEN → link."""
    rules: Mapping[RuleKey, Rule] = field(default_factory=_frozen)
    """nft and iptables rules, in the order in which they stand in their chain."""
    filter_peers: Mapping[str, str] = field(default_factory=_frozen)
    """Tunnel address that may send encapsulated packets → name of the nft set that holds it."""
    ports: Mapping[str, Port] = field(default_factory=_frozen)
    flows: Mapping[str, str] = field(default_factory=_frozen)
    """"PRIORITY FIELD,FIELD…" (fields sorted, ports by name) → actions."""
    neighbours: Mapping[str, str] = field(default_factory=_frozen)
    """Peer gateway → peer MAC, permanent, on kbr0."""
    fdb: Mapping[str, str] = field(default_factory=_frozen)
    """Peer MAC → port of kbr0 behind which it is."""
    routes: Mapping[RouteKey, Route] = field(default_factory=_frozen)
    restore_wait: Mapping[str, bool] = field(default_factory=_frozen)
    """"flow-restore-wait" → True while ovs-vswitchd waits for its flows; we want it gone."""
    docker: Mapping[str, str] = field(default_factory=_frozen)
    """Setting of the Docker daemon → value: what makes it plug containers into kbr0."""
    cni: Mapping[str, str] = field(default_factory=_frozen)
    """File name in the CNI directory → its text. The last kind: written once all else is true, removed first."""


KINDS: tuple[str, ...] = tuple(f.name for f in fields(Dataplane))
PEER_KINDS = ("filter_peers", "ports", "flows", "neighbours", "fdb", "routes")
"""The kinds that grow with the mesh: each peer has parts of them."""


class Unmanaged(NamedTuple):
    """An unmanaged object that conflicts with a managed one, or stands inside it.

    `kind` and `key` are those of the part of Dataplane that it stands in the way of;
    `blocks` is False where it only stands beside managed parts (a port of another owner in obr0).
    """

    kind: str
    key: object
    detail: str
    blocks: bool = True


@dataclass(frozen=True, slots=True)
class Observed:
    """What was read back from the system: ours, what is in the way, what could not be read."""

    dataplane: Dataplane
    unmanaged: tuple[Unmanaged, ...] = ()
    problems: tuple[Problem, ...] = ()
    unknown: frozenset[str] = frozenset()
    """Kinds (fields of Dataplane) that can't be observed now, so nothing is planned for them."""
    docker: str = ""
    """Docker here in a few words, for the reader; "" for none."""
