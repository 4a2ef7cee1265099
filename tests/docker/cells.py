"""What the Docker matrix asks: who connects to whom, in which situations, and which answers may differ on kbr0.

Pure. matrix.py asks, on docker0 without ovsmesh and on kbr0 with it. docs/docker.md has `DIFFERENCES` as a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

CONTAINERS = {"web": "bridge", "idle": "bridge", "shop": "front", "back": "rear", "vault": "inner"}
"""Containers of the host under test → their network: Docker's default, two user-defined ones, an internal one."""
PUBLISHED = {"web": 8080, "shop": 8081}
"""Containers with a published port → the port of the host."""
REMOTE = ("pod", "neighbour")
"""A pod of the other host, and that host, which is on the same link."""
BARRED = {"outside DOCKER-USER": "outside", "outside FORWARD": "outside", "pod DOCKER-USER": "pod"}
"""Targets that the user's rules keep containers of the default network from → the place that they are at."""
GUEST = "outside barred"
"""A client outside that the user's rules keep from the containers of the default network."""

SWITCH = "switch"
REFUSED = "icc false"
"""The situation in which the agent leaves Docker on docker0, and builds the rest of the mesh."""
SITUATIONS = {
    SWITCH: "plain",
    "range added": "plain",
    "rule repaired": "plain",
    "reboot, agent first": "reboot",
    "reboot, Docker first": "reboot",
    "cleanup after reboot": "plain",
    REFUSED: "icc false",
    "cleanup": "icc false",
}
"""Situations in the order in which they come to pass → the situation without ovsmesh that each is compared with."""
CHANGES = ("range added", "rule repaired")
"""Situations that start no container and stop none."""
ON_DOCKER0 = ("cleanup after reboot", "cleanup")
"""Situations without an agent."""

STATE, NETWORKS, PUBLISH, OUTBOUND = "switch", "networks", "published ports", "outbound"
RULES, DIRECT, MESH = "user's rules", "direct access", "cross-host"
GROUPS = (STATE, NETWORKS, PUBLISH, OUTBOUND, RULES, DIRECT, MESH)


LEFT = ("rules", "links")
"""Targets of what is compared where Docker is on docker0 again."""


NO_ANSWER = "no answer"


class Probe(NamedTuple):
    """One question. `version` is 4 or 6, 0 where no packet is sent."""

    group: str
    client: str
    target: str
    version: int

    def __str__(self) -> str:
        return f"{self.client} → {self.target}" + (f" IPv{self.version}" if self.version else "")


IDLE = Probe(STATE, "idle", "", 0)
"""Whether the container without a restart policy runs."""
NAMED = {
    REFUSED: Probe(STATE, "agent", "icc before the switch", 0),
    "cleanup": Probe(STATE, "agent", "icc on kbr0", 0),
}
"""Situation → whether the agent has said that Docker keeps containers of one bridge from each other."""
Observation = Mapping[Probe, str]


def probes() -> Iterator[Probe]:
    """Yield every connection that is tried in a situation."""
    clients = ("host", *REMOTE, "outside", *CONTAINERS)
    for version in (4, 6):
        for client in clients:
            for target in CONTAINERS:
                if client != target:
                    yield Probe(_to_container(client, target), client, target, version)
            for target in PUBLISHED:
                yield Probe(PUBLISH, client, f"port of {target}", version)
            if client in CONTAINERS:
                yield Probe(OUTBOUND, client, "outside", version)
                yield Probe(NETWORKS, client, "host", version)
                for target in REMOTE:
                    yield Probe(MESH if CONTAINERS[client] == "bridge" else OUTBOUND, client, target, version)
        for target in PUBLISHED:
            yield Probe(PUBLISH, "host", f"port of {target} on loopback", version)
            yield Probe(RULES, GUEST, f"port of {target}", version)
        yield Probe(RULES, GUEST, "web", version)
        for target in BARRED:
            yield Probe(RULES, "web", target, version)


def _to_container(client: str, target: str) -> str:
    if client in REMOTE and CONTAINERS[target] == "bridge":
        return MESH
    return DIRECT if client in (*REMOTE, "outside") else NETWORKS


class Difference(NamedTuple):
    """What kbr0 does otherwise than docker0, for the reader, and of which probes that is with which answer."""

    what: str
    docker0: str
    kbr0: str
    answer: Callable[[Probe, Observation], str | None]
    """From a probe and what docker0 answered to the answer on kbr0; None for a probe that it is not about."""


def _cross_host(probe: Probe, baseline: Observation) -> str | None:
    if probe.group == RULES and probe.target == "pod DOCKER-USER":
        # where Docker has no such chain in this family, the user has no such rule
        return None if baseline[probe._replace(target="outside DOCKER-USER")] == NO_ANSWER else probe.client
    if probe.group != MESH:
        return None
    if probe.target.endswith("at full size"):
        return "answers"
    return probe.client if probe.client in REMOTE or probe.target == "pod" else None


def _masquerade6(probe: Probe, baseline: Observation) -> str | None:
    if CONTAINERS.get(probe.client) != "bridge" or probe.version == 4:
        return None
    if CONTAINERS.get(probe.target) == "inner":
        # Docker without rules for IPv6 lets everything in, and only a route for the answer is missing
        return "host" if baseline[probe._replace(target="shop")] == probe.client else None
    beyond = probe.target in ("shop", "back") or probe.target.startswith(("outside", "neighbour"))
    return "host" if beyond and baseline[probe] == probe.client else None


def _settings(probe: Probe, _baseline: Observation) -> str | None:
    wanted = {"range": "10.97.1.0/24", "MTU": "1462"} if CONTAINERS.get(probe.client) == "bridge" else {}
    return wanted.get(probe.target)


DIFFERENCES = (
    Difference(
        "addresses and MTU",
        "Docker's range, and its MTU of 1500",
        "the host's pod range, and the MTU that the tunnels leave (1462)",
        _settings,
    ),
    Difference("containers of other hosts", "do not answer", "answer, by their own addresses", _cross_host),
    Difference(
        "IPv6 to beyond the mesh, with Docker 26 or older",
        "leaves with the container's address; Docker keeps no network from another",
        "leaves with the host's address, as IPv4 does, so that answers also come from where no route leads back",
        _masquerade6,
    ),
)


def _as_the_host(baseline: Observation) -> Iterator[tuple[Probe, str]]:
    """Yield the probes from containers on docker0 to pods of other hosts: Docker masquerades all that leaves."""
    for probe in baseline:
        beyond = probe._replace(group=OUTBOUND, target="outside")
        if probe.target == "pod" and baseline.get(beyond) == "host":
            yield probe, "host"


def wanted(baseline: Observation, situation: str) -> dict[Probe, str]:
    """Return the answers that a situation must have, from those that docker0 had without ovsmesh."""
    found = dict(baseline)
    if situation in NAMED:
        found[NAMED[situation]] = "is named"
    if situation in ON_DOCKER0:
        return found
    for target in LEFT:
        found.pop(Probe(STATE, "host", target, 0), None)
    if situation == REFUSED:
        return found | dict(_as_the_host(baseline))
    if situation in CHANGES:
        found[IDLE] = "runs"
    for probe in baseline:
        for difference in DIFFERENCES:
            if (other := difference.answer(probe, baseline)) is not None:
                found[probe] = other
    return found
