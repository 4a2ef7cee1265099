"""The dataplane as types: what a node's system holds, desired and observed alike, and what a host tells of itself.

Everything is frozen. Parts that exist once a peer are NamedTuples of strings: five thousand of them are
compared in every reconcile, and tuples compare in C.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
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
TUNNEL_LINKS = {"gre": "gre_sys", "vxlan": "vxlan_sys_4789", "geneve": "genev_sys_6081"}
"""Encapsulation → the link that carries all its tunnels in the kernel's datapath."""
FDB_LEARNED = 4096
"""MACs that kbr0 learns at most: two dozen times what the pods of a node have, and soon looked through."""
FALLBACK_METRIC = 4278198272
"""Metric of the unreachable routes: behind everything that anyone adds on purpose."""


class CniPlugin(NamedTuple):
    """A CNI plugin, as all copies of it that were found answer."""

    name: str
    versions: tuple[str, ...] = ()
    """CNI versions that all copies support."""
    why: str = ""
    """Why it can't be used; "" when it can."""


class Chained(NamedTuple):
    """What others put into the managed conflist (istio-cni, linkerd-cni, Cilium, bandwidth, tuning)."""

    settings: str = "{}"
    """Their keys of the conflist itself, as a JSON object."""
    entries: tuple[tuple[int, str], ...] = ()
    """Their plugins in order: how many managed ones stand before it, and its JSON object."""
    plugins: tuple[CniPlugin, ...] = ()
    """The same plugins, as they answer."""


class CniFacts(NamedTuple):
    """What the CNI conflist depends on."""

    directory: str
    plugins: tuple[CniPlugin, ...]
    kept: str = ""
    """The managed conflist as it is on disk, where a plugin that it needs is missing."""
    chained: Chained = Chained()


@dataclass(frozen=True, slots=True)
class Facts:
    """What the desired dataplane depends on besides the mesh, and only this host can tell."""

    underlay_mtu: int | None = None
    """Smallest MTU in bytes on the ways to the peers' tunnel addresses; None while no way is known."""
    kept_mtu: int | None = None
    """MTU of pods in bytes as it is in place, while the way to a peer is not known; else None."""
    tunnel_address: bool = True
    """Whether a link has self's tunnel address."""
    path_mtus: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Peer → bytes of the largest packet that passes, where that is less than the pods' MTU; as the probes found, or as
    the peer's route has it until they know."""
    datapath_type: str = "system"
    """"system" (kernel) or "netdev" (userspace)."""
    datapath_carried: bool = True
    """Whether a bridge of the userspace datapath holds the tunnel address; the kernel's needs none."""
    ipv6: bool = True
    """Whether the kernel has IPv6 at all."""
    ra_links: tuple[str, ...] = ()
    """Links whose IPv6 default route came from a router advertisement."""
    forward_drop: tuple[str, ...] = ()
    """"iptables" and/or "ip6tables": whose FORWARD chain holds rules or a policy that may drop."""
    exits: tuple[str, ...] = ()
    """Links by which packets leave this host; bridges of others are none of them."""
    bridges: tuple[str, ...] = ()
    """All bridges of others."""
    forward_limited: tuple[int, ...] = ()
    """IP versions that this host forwards because of the agent alone: nobody had that on before it."""
    forward_nft: bool = False
    """Whether an nft table of others filters forwarded packets: it may accept what no iptables rule does."""
    firewall_missing: tuple[str, ...] = ()
    """What this host's packet filter is known not to support; see firewall_rules.supported."""
    service: str = ""
    """The ClusterIP by which this process reaches the API server; "" for none."""
    pod_ports: tuple[str, ...] = ()
    """Ports of kbr0 but obr0, where the packet filter can't tell them by itself."""
    cni: CniFacts | None = None
    """None: CNI is left alone."""
    docker: str = ""
    """"replace": move Docker to kbr0; "keep": it is there, keep its file in step; "": leave Docker alone."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """A Docker daemon as it was seen at one moment."""

    state: str
    """"up", "down" or "starting" (it holds its socket and does not answer)."""
    why: str = ""
    version: str = ""
    bridge: str = ""
    """The default bridge; "" for none."""
    mtu: int = 0
    subnets: tuple[str, ...] = ()
    ipv6: bool = False
    live_restore: bool = False
    isolates: bool = False
    """Whether it refuses packets between two ports of its default bridge (`icc: false`)."""
    running: tuple[str, ...] = ()
    """Names of the running containers."""
    returning: tuple[str, ...] = ()
    """Those of them that Docker starts again after a restart."""
    instance: tuple[int, int] = (0, 0)
    """Process id and start time; zeros where it can't be seen."""
    flags: tuple[str, ...] = field(default=(), repr=False)
    """Its command line."""
    unsuitable: str = ""
    """Why no Docker of this kind can be moved to kbr0, by its name; "" if this one can."""
    off: str = ""
    """What says that it is off on purpose; "" if nothing does."""
    read_at: float = field(default=0.0, compare=False)
    """When the reading began, on the monotonic clock."""


class Link(NamedTuple):
    """A managed network device. MTU in bytes. `master` "" means none."""

    kind: str
    mtu: int
    up: bool = True
    master: str = ""
    mac: str = ""
    """Lower case; "" where any will do."""
    quiet: bool = False
    """Bridge port that neither learns nor is flooded to."""
    unmarked: bool = False
    """It has no ownership mark yet: the CNI bridge plugin made it for the managed conflist."""


class Bridge(NamedTuple):
    """The OVS bridge as its database row holds it."""

    datapath_type: str
    fail_mode: str = "standalone"
    mtu_request: int = 0
    extra: tuple[str, ...] = ()
    """Columns that someone has set and that break the mesh: "controller", "stp_enable", "rstp_enable"."""
    devices_lost: bool = False
    """Whether what the switch made of the row is gone: the link obr0 or, with tunnels, the datapath's port for them."""


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
    """A route; its key is (destination, metric)."""

    type: str
    """"unicast" or "unreachable"."""
    via: str = ""
    dev: str = ""
    mtu: int = 0


class Rule(NamedTuple):
    """A filter rule; its key is (iptables, ip6tables or nft family; chain; name)."""

    text: str


RouteKey = tuple[str, int]
RuleKey = tuple[str, str, str]


def _frozen() -> Mapping[Any, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Dataplane:
    """Everything that the agent manages on a node. The same type for desired and observed.

    Each field maps what identifies a part to its value. Parts are added in the order of the fields, and removed
    in reverse.
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
    """Element of a set of the filter rules, such as a tunnel address → name of the set, see firewall_rules.SETS."""
    ports: Mapping[str, Port] = field(default_factory=_frozen)
    flows: Mapping[str, str] = field(default_factory=_frozen)
    """"PRIORITY FIELD,FIELD…" (fields sorted, ports by name) → actions."""
    neighbours: Mapping[str, str] = field(default_factory=_frozen)
    """Peer gateway → peer MAC, permanent, on kbr0."""
    fdb: Mapping[str, str] = field(default_factory=_frozen)
    """Peer MAC → port of kbr0 behind which it is; sticky, so that no frame moves it."""
    routes: Mapping[RouteKey, Route] = field(default_factory=_frozen)
    restore_wait: Mapping[str, bool] = field(default_factory=_frozen)
    """"flow-restore-wait" → True while ovs-vswitchd waits for its flows. Never desired."""
    docker: Mapping[str, str] = field(default_factory=_frozen)
    """Setting of Docker → value: what makes Docker plug containers into kbr0."""
    cni: Mapping[str, str] = field(default_factory=_frozen)
    """File name in the CNI directory → its text. The last kind: written when all else is in place, removed first."""


KINDS: tuple[str, ...] = tuple(f.name for f in fields(Dataplane))
PEER_KINDS = ("filter_peers", "ports", "flows", "neighbours", "fdb", "routes")
"""The kinds that grow with the mesh: each peer has parts of them."""


class Unmanaged(NamedTuple):
    """An unmanaged object that conflicts with a managed one, or stands inside it."""

    kind: str
    key: object
    """Kind and key of the part that it stands in the way of."""
    detail: str
    blocks: bool = True
    """False where it stands beside managed parts only, as another's flow in obr0 does."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What was read back from the system: what is managed, what is in its way, what could not be read."""

    dataplane: Dataplane
    unmanaged: tuple[Unmanaged, ...] = ()
    problems: tuple[Problem, ...] = ()
    unknown: frozenset[str] = frozenset()
    """Kinds that can't be observed now, so nothing is planned for them."""
    docker: str = ""
    """Where Docker's containers are plugged in, for the reader; "" where there is no Docker."""


class Detour(NamedTuple):
    """A way that packets to a peer's pods take instead of kbr0, as the kernel says."""

    node: str
    cidr: str
    sender: str
    """"pods" or "this host itself"."""
    where: str
    """"to tailscale0", "nowhere (blackhole)"…"""
    why: str
    """The rule and the route that decide it."""
    remedy: str


class State(StrEnum):
    """What is known of a path."""

    UNPROBED = "not probed yet"
    OK = "ok"
    LOSSY = "lossy"
    SMALL = "small packets only"
    NOT_FORWARDED = "not forwarded"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Reach:
    """What is known of a peer, or of one path to it, at one moment.

    `since` is on the clock of whoever made it: the probes' own while it is one path's, seconds since the epoch once it
    is a peer's. All other times are in seconds.
    """

    state: State = State.UNPROBED
    since: float = 0.0
    round_trip: float | None = None
    """Exponentially weighted mean (1/8, as TCP's in RFC 6298) of the answered ones."""
    round_trip_p99: float | None = None
    loss: float | None = None
    """Lost of the last hundred, 0 to 1."""
    path_mtu: int | None = None
    """Bytes of the largest IP packet that is known to pass, where that is less than full size: with the state OK it is
    what the peer's own pods can take."""
    sent: int = 0
    lost: int = 0
    silent_since: float | None = None
    """When the first of the probes was sent that were not answered since the last answer; None after an answer."""
    heard: bool = False
    """Whether probes of the peer itself have arrived here since then."""
    error: str = ""
    """Why probes can't be sent, where that is the case."""
    destination: str = ""
    """Address of the peer that this is about."""


class Drop(NamedTuple):
    """A rule or a policy that dropped packets of the trace, or other packets while the trace ran."""

    rule: str
    table: str
    certain: bool = True
    """False where only its counter grew, which others' packets may have done."""
    chain: tuple[str, str, str] = ("", "", "")
    """Family, table and chain of nf_tables, where they are known."""
    todo: str = ""
    """What lets the packets through."""


class HookCount(NamedTuple):
    """How many of the trace's packets were seen at the first and the last place of a hook."""

    hook: str
    first: int
    last: int
    back: bool


@dataclass(frozen=True, slots=True)
class FilterFound:
    """What the packet filter did to the packets of a trace."""

    drops: tuple[Drop, ...] = ()
    hooks: tuple[HookCount, ...] = ()
    tables: tuple[str, ...] = ()
    """Every table of others that may see packets of the mesh."""
    suspects: tuple[Drop, ...] = ()
    """Rules and policies of others that drop forwarded packets of some kind."""
    blind: str = ""
    """Why no packet could be followed through it; "" where it could."""
