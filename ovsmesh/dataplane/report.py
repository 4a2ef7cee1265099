"""The report of one node, which CLI, status page, metrics and MeshNode show: its types, its JSON, causes as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple

from ovsmesh.dataplane import cni_config
from ovsmesh.dataplane.plan import Plan
from ovsmesh.dataplane.types import Dataplane, Facts, Observed, Reach, State
from ovsmesh.errors import Problem
from ovsmesh.mesh.types import Mesh
from ovsmesh.names import ENCAPSULATIONS
from ovsmesh.reasons import Reason
from ovsmesh.text import timestamp

NOT_REACHED = frozenset({State.UNREACHABLE, State.NOT_FORWARDED, State.LOSSY, State.SMALL})
"""States of a peer that is wired as wanted, and to which packets are lost all the same."""


class Traffic(NamedTuple):
    """What a port has counted since it was made; None: not known. `errors` includes dropped packets."""

    rx_packets: int | None = None
    tx_packets: int | None = None
    rx_bytes: int | None = None
    tx_bytes: int | None = None
    errors: int | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """A mass removal that the agent holds back."""

    peers: tuple[str, ...]
    digest: str
    """What `ovsmesh confirm` names: these removals and no others."""
    until: float
    """When they are carried out all the same, in seconds since the epoch."""
    left: float = 0.0
    """Seconds until then, at the time of the report."""


@dataclass(frozen=True, slots=True)
class ReconcileResult:
    """What a look at the system has found, or a reconcile has left."""

    mesh: Mesh | None = None
    facts: Facts | None = None
    want: Dataplane | None = None
    have: Observed | None = None
    plan: Plan = field(default_factory=Plan)
    """What is left to do."""
    problems: tuple[Problem, ...] = ()
    converged: bool = False
    """Nothing is left to do and nothing is in the way: every peer that the mesh rightly names is joined.

    A mesh that could not be read and peers that were refused are problems all the same.
    """
    mesh_current: bool = False
    """Whether the source says this now; else it is the last known good mesh."""
    duration: float = 0.0
    """Seconds."""
    mesh_since: float = 0.0
    """When the mesh was read, or, for the last known good one, stored; in seconds since the epoch, 0 for never."""
    drift: Plan = field(default_factory=Plan)
    """What someone else had changed."""
    held: Held | None = None
    """The removals that an agent holds."""


@dataclass(frozen=True, slots=True)
class Agent:
    """The agent of a host, as whoever makes a report knows it. Times are seconds since the epoch; None: not known."""

    since: float | None = None
    """When it was started; None when none runs."""
    version: str = ""
    problem: Problem | None = None
    """Why it can't be relied on; None for one that runs as it should."""
    alive: bool = True
    """Whether it tells now what the probes find."""
    heard: float | None = None
    """When its last report was true, for one that is not alive."""
    said: str = ""
    """The verdict of that report."""


@dataclass(frozen=True, slots=True)
class ReportContext:
    """What only the process that asks knows. Times are seconds since the epoch; None: not known."""

    now: float
    agent: Agent = Agent()
    ovs_version: str = ""
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    """Port → what it has counted."""
    mesh_from: str = ""
    """The file or the API server that the mesh came from."""
    mesh_in_force: tuple[str, float | None] | None = None
    """Digest of the mesh that an agent works with and when it was read; None: the report's own."""
    last_change: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    """Peer → when and how a part of it was changed last."""
    reach: Mapping[str, Reach] = field(default_factory=dict)
    """Peer → what the probes found, or, where the agent is not alive, had found."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition as in Kubernetes: `status` is "True", "False" or "Unknown"."""

    type: str
    status: str
    reason: Reason
    message: str = ""


@dataclass(frozen=True, slots=True)
class Self:
    """The node itself."""

    name: str
    address: str = ""
    pod_cidrs: tuple[str, ...] = ()
    gateways: tuple[str, ...] = ()
    encapsulation: str = ""
    key: int | None = None
    mtu: int = 0
    mtu_from: str = ""
    datapath_type: str = ""
    cni: cni_config.ConflistStatus | None = None
    ovs_version: str = ""
    agent_running: bool = False
    """Whether an agent runs and tells what it finds."""
    agent_since: float | None = None
    agent_version: str = ""
    mesh_from: str = ""
    mesh_since: float | None = None
    mesh_current: bool = True
    mesh_digest: str = ""
    """See manifest.digest: hosts with the same mesh have the same."""
    forwarding: str = ""
    """What else than the mesh's packets this host does not forward; "" where it forwards all that comes."""
    docker: str = ""
    """Where Docker's containers are plugged in; "" where there is no Docker, or it is left alone."""
    agent_heard: float | None = None
    """When the last report of an agent that does not run or answer was true."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One peer as this node is wired to it."""

    name: str
    state: str
    """"missing", "held" (left the mesh, removal held), "refused" or "unknown" (can't be observed or probed now).

    Where the wiring is in place and an agent probes: what the probes found, see types.State.
    """
    address: str = ""
    pod_cidrs: tuple[str, ...] = ()
    port: str = ""
    traffic: Traffic | None = None
    last_change: float | None = None
    last_change_text: str = ""
    missing: tuple[str, ...] = ()
    """Which parts are not as wanted, and why; or why packets do not get through."""
    reach: Reach | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that a user may want to know of one node, at one moment."""

    time: float
    headline: str
    converged: bool
    self: Self
    conditions: tuple[Condition, ...]
    peers: tuple[Peer, ...]
    pending: tuple[str, ...]
    """The plan's lines: what is still to be done, is blocked or is held."""
    unmanaged: tuple[str, ...]
    problems: tuple[Problem, ...]
    held: Held | None = None

    @property
    def well(self) -> bool:
        """Whether the node is in sync, an agent keeps it so, and packets get through to every peer."""
        good = self.converged and self.self.agent_running and not any(problem.wrong for problem in self.problems)
        return good and all(peer.state == "ok" for peer in self.peers)

    def count(self, state: str) -> int:
        """Return how many peers are in a state; "wanted" counts all but the held and the refused."""
        if state == "wanted":
            return sum(peer.state not in ("held", "refused") for peer in self.peers)
        return sum(peer.state == state for peer in self.peers)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON and YAML: names in camelCase, times as RFC 3339, nothing that is not set."""
        plain = _plain(self)
        assert isinstance(plain, dict)
        return {**plain, "well": self.well}


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join("CIDRs" if word == "cidrs" else word.title() for word in rest)


_JSON_NAMES = {"unmanaged": "foreign"}
"""Field → its key in JSON, where it has had another name since the first release."""
_TIMES = frozenset(
    {"time", "agent_since", "agent_heard", "mesh_since", "last_change", "since", "silent_since", "until"}
)


@cache
def _keys(kind: type) -> tuple[tuple[str, str, bool], ...]:
    """Return attribute, key in JSON and whether it is a time, for what is shown as an object; () for other types."""
    if is_dataclass(kind):
        names = [*(field.name for field in fields(kind)), *(["wrong"] if kind is Problem else [])]
    else:
        names = list(Traffic._fields) if kind is Traffic else []
    return tuple((name, _JSON_NAMES.get(name, _camel(name)), name in _TIMES) for name in names)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, str):
        # YAML takes no subclass of str
        return str(value)
    kind: type = type(value)
    keys = _keys(kind)
    if not keys:
        return [_plain(item) for item in value] if isinstance(value, tuple) else value
    return {
        key: timestamp(item) if is_time else _plain(item)
        for name, key, is_time in keys
        if (item := getattr(value, name)) is not None and item != ""
    }


_CARRIED_BY = dict(
    zip(ENCAPSULATIONS, ("GRE (IP protocol 47)", "VXLAN (UDP port 4789)", "Geneve (UDP port 6081)"), strict=True)
)


def cause(reach: Reach, mtu: int, encapsulation: str, own: str, peer: str) -> str:
    """Return the likely cause of what the probes found, and what to look at; "" where all is well or nothing is known.

    `mtu` is the pods' MTU in bytes; `own` and `peer` are the two tunnel addresses.
    """
    if reach.error and reach.state in (State.UNREACHABLE, State.NOT_FORWARDED):
        return f"packets to {reach.destination} can't be sent: {reach.error}"
    if reach.state is State.UNREACHABLE:
        carried = _CARRIED_BY[encapsulation]
        if reach.heard:
            return f"its packets arrive here, and ours are not answered: is {carried} blocked from {own} to {peer}?"
        return f"nothing arrives from it: is the host down, or {carried} blocked between {own} and {peer}?"
    if reach.state is State.NOT_FORWARDED:
        return (
            "it answers, but forwards no packets to its pods and back: a firewall rule or policy there drops them "
            "(FORWARD), or ip_forward is 0 there; `ovsmesh status` there names it"
        )
    if reach.state is State.SMALL:
        return (
            f"packets above {reach.path_mtu} bytes are lost, and pods send up to {mtu} (their route is set to "
            f"{reach.path_mtu}, so that senders are told): "
            f"raise the MTU between {own} and {peer}, or set the mesh's `mtu` to {reach.path_mtu}"
        )
    if reach.state is State.LOSSY:
        return f"{reach.loss or 0:.0%} of the probes are lost between {own} and {peer}"
    return ""
