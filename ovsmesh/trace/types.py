"""What a trace is made from and what it says: places, evidence, hops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ovsmesh.dataplane.types import Drop as Drop
from ovsmesh.dataplane.types import FilterFound as FilterFound
from ovsmesh.dataplane.types import HookCount as HookCount
from ovsmesh.linux.rtnetlink import REFUSED_SOURCE as REFUSED_SOURCE
from ovsmesh.linux.rtnetlink import LinkFound as LinkFound
from ovsmesh.linux.rtnetlink import PolicyRule as PolicyRule
from ovsmesh.linux.rtnetlink import RouteFound as RouteFound
from ovsmesh.mesh.types import IPAddress, IPNetwork


class Kind(StrEnum):
    """What an address of the mesh belongs to."""

    POD = "pod"
    GATEWAY = "gateway"
    TUNNEL = "tunnel address"
    OTHER = "other address"
    """One of the host's own that is none of these, such as a second link's."""


@dataclass(frozen=True, slots=True)
class Place:
    """One end of a trace."""

    address: IPAddress
    kind: Kind
    node: str
    cidr: IPNetwork | None = None
    """The node's range that holds it; None for a tunnel address."""
    name: str = ""
    """What the user called it, where that was not the address."""
    link: str = ""
    """The link that has it, where it is another address of the host."""
    instead: str = ""
    """The address that the host's own packets are to have instead of it."""

    def __str__(self) -> str:
        return f"{self.name} ({self.address})" if self.name else str(self.address)


class Verdict(StrEnum):
    """What is known of a hop."""

    OK = "ok"
    BROKEN = "broken"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of the way: what was wanted there, what was found, and what follows."""

    name: str
    found: str
    verdict: Verdict = Verdict.OK
    wanted: str = ""
    todo: str = ""
    after: str = ""
    """The last point before it at which packets are seen, see Point; "" where it can't stop a packet."""
    until: str = ""
    """The last point at which packets that it stops may still be seen: a wrong MAC takes them on, to nobody."""
    reached: bool = True
    """False where no packet came this far, so that it is as wanted and not seen to work."""


class Point(StrEnum):
    """Where packets are seen on their way, in this order; there and back again."""

    SENT = "sent"
    PORT = "port"
    KBR_IN = "kbr0 in"
    KBR_OUT = "kbr0 out"
    OBR = "obr0"
    UNDERLAY = "underlay"
    TARGET_PORT = "port of the destination"
    UNDERLAY_BACK = "underlay, back"
    OBR_BACK = "obr0, back"
    TARGET_PORT_BACK = "port of the destination, back"
    KBR_IN_BACK = "kbr0 in, back"
    KBR_OUT_BACK = "kbr0 out, back"
    PORT_BACK = "port, back"
    ANSWERED = "answered"


@dataclass(frozen=True, slots=True)
class PodFound:
    """A pod's own network as it is inside, and the port of this host that it is plugged into."""

    where: str
    """How its namespace was found."""
    interface: LinkFound
    port: LinkFound | None
    route: RouteFound = field(default_factory=RouteFound)
    """To the other end of the trace."""
    gateway_mac: str = ""
    """Of the route's gateway in the pod's neighbour table; "" where there is no entry."""
    gateway_static: bool = False
    others: tuple[str, ...] = ()
    """Ports of kbr0 behind which another pod has the same address."""


@dataclass(frozen=True, slots=True)
class EchoFound:
    """What became of echo requests of one kind."""

    sent: int = 0
    answered: int = 0
    size: int = 0
    """Bytes of the IP packet."""
    errors: tuple[str, ...] = ()
    """ICMP errors that came, as "SENDER: TEXT"."""
    refused: str = ""
    """Why it could not be sent."""
    round_trip: float | None = None
    """Seconds; the smallest."""


@dataclass(frozen=True, slots=True)
class PeerFound:
    """What can be told of the peer from here."""

    name: str
    address: IPAddress
    gateway: IPAddress
    gateway_echo: EchoFound = field(default_factory=EchoFound)
    underlay_echo: EchoFound = field(default_factory=EchoFound)
    unused_echo: EchoFound = field(default_factory=EchoFound)
    """To an address of its range that nothing has: its kernel says so, if it forwards at all."""
    agent: str = "unknown"
    """"ok", or what is wrong with it; "unknown" where it can't be asked."""
    headline: str = ""
    heard: bool = False
    """Whether tunnel packets came from it while the trace ran."""
    underlay_errors: tuple[str, ...] = ()
    """ICMP errors about the tunnel's packets."""
    path_mtu: int | None = None
    """Bytes of the largest packet that came back, where full size did not."""


@dataclass(frozen=True, slots=True)
class Switch:
    """What the Open vSwitch side shows. Counts are of the time of the trace."""

    flow_out: int | None = None
    """Packets of the flow to the peer; None where it is missing or can't be read."""
    flow_back: int | None = None
    port_out: int | None = None
    port_back: int | None = None
    port_name: str = ""
    port_error: str = ""
    port_number: int | None = None
    shadow_out: str = ""
    """An unmanaged flow that takes the packet before the managed one."""
    shadow_back: str = ""
    unanswered: str = ""
    """Why the switch can't be asked."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that was collected. What could not be is None or says so."""

    source: Place
    target: Place
    self_name: str
    sent_from: str
    """Where the packets were sent from: "pod", "host", or "host for the pod"."""
    mtu: int
    """Wanted, of pods."""
    seen: Mapping[Point, int] = field(default_factory=dict)
    """How many packets were seen where; no entry where nobody could look."""
    seen_full: Mapping[Point, int] = field(default_factory=dict)
    """The same for packets of full size."""
    rewritten: str = ""
    """What somebody's rules have made of the packets' addresses, as "source 10.97.1.1"; "" for nothing."""
    small: EchoFound = field(default_factory=EchoFound)
    full: EchoFound = field(default_factory=EchoFound)
    pod: PodFound | None = None
    """The source, where it is a pod of this node and can be looked into."""
    target_pod: PodFound | None = None
    blind_ports: int = 0
    """Ports of kbr0 that lead where nobody can look from here."""
    links: Mapping[str, LinkFound] = field(default_factory=dict)
    route: RouteFound = field(default_factory=RouteFound)
    route_back: RouteFound = field(default_factory=RouteFound)
    policy: tuple[PolicyRule, ...] = ()
    policy_back: tuple[PolicyRule, ...] = ()
    peer_mac: str = ""
    """MAC that the peer has on the mesh; "" without a peer."""
    neighbour: str = ""
    """MAC of the next hop as kbr0 knows it now; "" for none."""
    pod_neighbour: str = ""
    fdb: Mapping[str, str] = field(default_factory=dict)
    """MAC → port of kbr0."""
    underlay_route: RouteFound = field(default_factory=RouteFound)
    underlay_link: LinkFound | None = None
    filter: FilterFound = field(default_factory=FilterFound)
    switch: Switch = field(default_factory=Switch)
    peer: PeerFound | None = None
    agent: str = ""
    """What is wrong with the agent of this node; "" where it runs."""
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Kind of part → what differs from the desired dataplane, of all that this way needs."""
    unknown: frozenset[str] = frozenset()
    """Kinds that could not be observed."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """What a trace found."""

    headline: str
    state: str
    """"arrives", "stops", "degraded" (it arrives, and something is not as wanted) or "unknown"."""
    todo: str
    hops: tuple[Hop, ...]
    stops_at: int | None
    """Number of the hop, from 1."""
    evidence: Evidence
