"""Carry out a plan on this host, in an order in which no packet is lost: add before delete, and what others need first.

One transaction or one bundle for many steps. A step that fails stops no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ovsmesh.containers.docker import DOCKER_ADDRESS
from ovsmesh.dataplane.docker_config import DOCKER0
from ovsmesh.dataplane.plan import Plan, Step
from ovsmesh.dataplane.types import KBR, KINDS, OBR, Dataplane
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.ovs.openflow import port_of
from ovsmesh.reasons import Reason
from ovsmesh.sysctl import write_sysctl

if TYPE_CHECKING:
    from ovsmesh.agent.driver import Driver

_KERNEL_TABLES = ("addresses", "neighbours", "fdb", "routes")
_DOCKER_NEEDS = ("bridges", "links", "addresses")
"""Kinds that must be in place before Docker is touched: dockerd gives a kbr0 without an address one of its own."""


class Apply:
    """One plan that is carried out."""

    def __init__(self, driver: Driver, todo: Plan, want: Dataplane) -> None:
        self._driver, self._todo, self._want = driver, todo, want
        self._set: dict[str, list[Step]] = {kind: [] for kind in KINDS}
        """Additions and changes."""
        self._remove: dict[str, list[Step]] = {kind: [] for kind in KINDS}
        for step in todo.steps:
            (self._remove if step.op == "-" else self._set)[step.kind].append(step)
        self._filter_first = bool(self._set["rules"] or self._set["filter_peers"])
        self._problems: list[Problem] = []

    def run(self) -> list[Problem]:
        """Carry the plan out and return what could not be done."""
        # first of all, so that no pod comes to what is removed
        self._conflist(self._remove["cni"])
        kbr = self._links(KBR)
        unused = self._bridge_and_ports()
        restored = self._add_flows()
        self._links(OBR)
        for step in self._set["sysctls"]:
            self._attempt(f"sysctl {step.key}", write_sysctl, step.key, step.want)
        if kbr:
            # without the link, another one may have its name meanwhile
            self._kernel_tables()
        self._removals(unused, restored)
        self._conflist(self._set["cni"])
        if self._driver.docker and not any(self._set[kind] for kind in _DOCKER_NEEDS):
            self._docker()
        return self._problems

    def _attempt(self, what: str, call: Callable[..., None], *args: Any, **options: Any) -> bool:
        try:
            call(*args, **options)
        except OvsmeshError as error:
            self._problems.append(Problem(Reason.ApplyFailed, f"{what}: {error}"))
            return False
        return True

    def _conflist(self, steps: list[Step]) -> None:
        if steps:
            self._attempt("CNI", self._driver.cni.apply, steps)

    def _links(self, name: str) -> bool:
        """Make or change a link. Return whether it is there."""
        there = True
        for step in self._set["links"]:
            if step.key == name:
                done = self._attempt(f"link {name}", self._driver.net.set_link, name, step.want, step.have)
                there = done or step.op != "+"
        return there

    def _filter_rules(self) -> None:
        held = {s.key: s.have for s in self._todo.held if s.kind == "filter_peers"}
        self._driver.firewall.apply(self._want.rules, {**held, **self._want.filter_peers})

    def _bridge_and_ports(self) -> list[str]:
        """Make bridge and ports in one transaction. Return the ports to delete later, when nothing uses them.

        New filter rules are written while the switch is busy. A port whose remote and key a new port takes goes in the
        same transaction: two ports of one configuration are impossible, and two transactions lose packets (490
        measured).
        """
        bridge = next((s.want for s in self._set["bridges"]), None)
        ports = {s.key: s.want for s in self._set["ports"]}
        taken = {(p.remote, p.key) for p in ports.values()}
        gone = self._remove["ports"]
        now = [s.key for s in gone if (s.have.remote, s.have.key) in taken]
        meanwhile = self._filter_rules if self._filter_first else lambda: None
        if any(s.have is not None and s.have.devices_lost for s in self._set["bridges"]):
            self._attempt(f"bridge {OBR}", self._driver.ovs.remake)
            self._driver.flows.dirty()
        if bridge is not None or ports:
            self._attempt("ports", self._driver.ovs.apply, bridge, ports, now, meanwhile=meanwhile)
        else:
            meanwhile()
        return [s.key for s in gone if s.key not in now]

    def _add_flows(self) -> bool:
        adds = {s.key: s.want for s in self._set["flows"]}
        return not adds or self._attempt("flows", self._set_flows, adds)

    def _set_flows(self, add: Mapping[str, str], delete: list[str] | None = None) -> None:
        """Write flows in one bundle. A port that the switch could not make holds back its own flows only."""
        ovs = self._driver.ovs
        ready = {key: actions for key, actions in add.items() if port_of(key, actions) in ovs.ofports}
        self._driver.flows.apply(ready, delete or [], ovs.ofports)
        absent = sorted({port_of(key, actions) for key, actions in add.items() if key not in ready})
        if absent:
            why = ovs.errors.get(absent[0], "it has no OpenFlow number")
            raise OvsmeshError(f"ovs-vswitchd could not make {len(absent)} ports, the first {absent[0]}: {why}")

    def _kernel_tables(self) -> None:
        steps = [s for kind in _KERNEL_TABLES for s in self._set[kind]]
        steps += [s for kind in reversed(_KERNEL_TABLES) for s in self._remove[kind]]
        if not steps:
            return
        net = self._driver.net
        try:
            refused = net.batch(
                [(s, net.message(s.op, s.kind, s.key, s.have if s.op == "-" else s.want)) for s in steps]
            )
        except OSError as error:
            self._problems.append(Problem(Reason.ApplyFailed, f"kernel tables: {error.strerror or error}"))
            return
        net.drain()
        self._problems += [
            Problem(Reason.ApplyFailed, f"could not {step.words}: {text}") for step, text in refused.items()
        ]

    def _removals(self, ports: list[str], restored: bool) -> None:
        """Remove ports, and flows and filter rules meanwhile: neither waits for the other. Then remove links."""
        bridge = bool(self._remove["bridges"])

        def meanwhile() -> None:
            flows = [s.key for s in self._remove["flows"]]
            if flows and not bridge:
                self._attempt("flows", self._set_flows, {}, flows)
            if not self._filter_first and (self._remove["rules"] or self._remove["filter_peers"]):
                self._filter_rules()

        clear = bool(self._remove["restore_wait"]) and (restored or self._driver.restore_overdue())
        if ports or bridge or clear:
            self._attempt("ports", self._driver.ovs.apply, None, {}, ports, bridge, clear, meanwhile)
        else:
            meanwhile()
        for step in self._remove["links"]:
            # obr0 goes with its bridge; without a bridge it is what a switch that died has left
            if step.key != OBR or not bridge:
                self._attempt(f"link {step.key}", self._driver.net.del_link, step.key)

    def _docker(self) -> None:
        docker, net = self._driver.docker, self._driver.net
        assert docker is not None
        steps = [*self._set["docker"], *self._remove["docker"]]
        for step in steps:
            if step.key.startswith(DOCKER_ADDRESS):
                net.batch([(step, net.message("-", "addresses", step.key.removeprefix(DOCKER_ADDRESS), KBR))])
        if steps and self._attempt("docker", docker.apply, steps, self._want) and not docker.busy:
            for step in steps:
                if step.key == DOCKER0:
                    self._attempt(f"link {DOCKER0}", net.del_link, DOCKER0)
