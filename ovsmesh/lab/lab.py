"""A mesh of hosts on one machine: network namespaces, a real Open vSwitch and a real agent each, real packets.

The demo, the tests and the benches use it. Another process finds a lab again by its state directory. Ending a lab
proves that nothing is left of it.

    NAME-hub    bridge `hub` 192.0.2.1, 2001:db8::1        the underlay, and the outside world
    NAME-hN     eth0 192.0.2.(10+N)    pods 10.97.N.0/24, fd00:97:N::/64
    NAME-hNpM   eth0 10.97.N.(1+M), fd00:97:N::(1+M), plugged into kbr0 of host N
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ovsmesh.lab import netns, state, underlay
from ovsmesh.lab.host import Host, Pod
from ovsmesh.lab.netns import LabError, Process
from ovsmesh.lab.ping import Pair, Prober, Track, ping
from ovsmesh.lab.state import (
    BASE,
    MOST_HOSTS,
    LabSettings,
    Proof,
    Step,
    kernel_datapath,
    names,
    own,
    preflight,
    quiet,
    write,
)
from ovsmesh.names import KBR

_WORKERS = 6
_numbers = itertools.count(1)
T = TypeVar("T")


class Lab:
    """A lab of `hosts` (2 to 20; 1 is allowed for tests) with `pods` each.

    `up()` makes it, `Lab.open(name)` finds it again from another process, `down()` leaves nothing.
    As a context manager it is up inside and down after. `step` is called with each step's name and
    returns a context manager around it, to show progress. `made` says whether this object is to end the lab.
    """

    def __init__(
        self,
        hosts: int = 3,
        pods: int = 1,
        *,
        name: str = "",
        dual_stack: bool = False,
        underlay6: bool = False,
        encapsulation: str = "gre",
        key: int | None = None,
        underlay_mtu: int = 1500,
        datapath: str = "",
        agents: bool = True,
        base: Path = BASE,
        ephemeral: bool = False,
        step: Step = quiet,
    ) -> None:
        self._base, self._agents, self.step = base, agents, step
        me = netns.identity(os.getpid()) if ephemeral else None
        numbers = tuple(range(1, hosts + 1))
        datapath = datapath or ("system" if kernel_datapath() else "netdev")
        name = name or f"t{os.getpid()}-{next(_numbers)}"
        self.settings = LabSettings(
            name, numbers, pods, dual_stack, underlay6, encapsulation, key, underlay_mtu, datapath, me
        )
        self.made = False
        state.check(self.settings, base)

    @classmethod
    def open(cls, name: str, base: Path = BASE, step: Step = quiet, remains: bool = False) -> Lab:
        """Return the lab of that name, from its state directory. With `remains`, also what is left of one, to end it.

        Raises LabError when there is none.
        """
        lab = cls.__new__(cls)
        lab._base, lab._agents, lab.step, lab.made = base, True, step, True
        if remains and not (base / name / "lab.json").exists() and (own(name) or (base / name).exists()):
            lab.settings = LabSettings(name, ())
        else:
            lab.settings = state.load(base, name)
        return lab

    def __enter__(self) -> Lab:
        try:
            self.up()
        except BaseException:
            if self.made:
                self.down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    # --- its parts

    @property
    def name(self) -> str:
        """The name of the lab."""
        return self.settings.name

    @property
    def state(self) -> Path:
        """The state directory."""
        return self._base / self.settings.name

    @property
    def mesh_file(self) -> Path:
        """The mesh file of all hosts."""
        return self.state / "mesh.yaml"

    @property
    def hub(self) -> str:
        """The underlay's namespace; its bridge has 192.0.2.1 and stands for the world outside."""
        return underlay.hub(self.settings)

    def host(self, index: int) -> Host:
        """Return host number `index`, from 1."""
        if index not in self.settings.hosts:
            raise LabError(f"host {index} of lab {self.name}: there are {', '.join(map(str, self.settings.hosts))}")
        return self._host(index)

    def _host(self, index: int) -> Host:
        return Host(self.settings, self.state, index)

    @property
    def hosts(self) -> list[Host]:
        """All hosts."""
        return [self._host(index) for index in self.settings.hosts]

    def pod(self, host: int, pod: int) -> Pod:
        """Return a pod by the numbers of its host and of itself, both from 1."""
        return self.host(host).pod(pod)

    @property
    def pods(self) -> list[Pod]:
        """All pods of all hosts."""
        return [pod for host in self.hosts for pod in host.pods]

    # --- up

    def up(self) -> Lab:
        """Make the lab. With agents, return when every agent is ready and every pod plugged in."""
        preflight(self.settings.datapath)
        with self._locked(create=True):
            if (self.state / "lab.json").exists():
                raise LabError(
                    f"lab {self.name} exists already; `ovsmesh lab down --name {self.name}`, or use another name"
                )
            self.made = True
            self._save()
            hosts = self.hosts
            with self.step(f"{len(hosts)} hosts and the underlay that joins them"):
                underlay.join(self.settings, hosts)
            with self.step(f"{len(hosts)} × ovsdb-server and ovs-vswitchd ({self._datapath_text})"):
                self._each(self._start_host, hosts)
                self._reach_underlay()
            self.write_mesh()
            if self._agents:
                with self.step(f"{len(hosts)} agents build {len(hosts) * (len(hosts) - 1)} tunnel ends"):
                    self._each(Host.start_agent, hosts)
                    # an emulated CPU (User-mode Linux) takes 6 s for each agent
                    self.converged(60 + 6 * len(hosts))
                with self.step(f"{len(hosts) * self.settings.pods} pods plugged into {KBR}"):
                    self._each(Host.plug, hosts)
                    self.warm_up()
        return self

    @property
    def _datapath_text(self) -> str:
        return "kernel datapath" if self.settings.datapath == "system" else "userspace datapath"

    def _each(self, do: Callable[[Host], T], hosts: Iterable[Host]) -> list[T]:
        with ThreadPoolExecutor(_WORKERS) as pool:
            return list(pool.map(do, hosts))

    def _start_host(self, host: Host) -> None:
        host.start_ovsdb()
        host.ovs_vsctl("--no-wait", "init")
        host.start_vswitchd(restore_wait=False)
        host.create_underlay()

    def _reach_underlay(self) -> None:
        """Ping from every host to every other over the underlay."""
        self._all_answer(
            "underlay", [Pair(a.ns, str(b.address), a.name, b.name) for a in self.hosts for b in self.hosts]
        )

    def warm_up(self) -> None:
        """Ping from every host to every other's gateway.

        The userspace datapath drops the first packets of a tunnel until it has learned its remote's MAC.
        Raises LabError when a gateway does not answer.
        """
        gateways = [(host, cidr.network_address + 1) for host in self.hosts for cidr in host.pod_cidrs]
        pairs = [Pair(a.ns, str(address), a.name, b.name) for a in self.hosts for b, address in gateways]
        self._all_answer("mesh", pairs)

    def _all_answer(self, what: str, pairs: Sequence[Pair]) -> None:
        left = [pair for pair in pairs if pair.source != pair.target]
        for timeout in (0.2, 0.5, 1.0, 3.0):
            tracks = ping(left, count=1, timeout=timeout)
            left = [track.pair for track in tracks if track.lost]
            if not left:
                return
        silent = ", ".join(f"{pair.source} → {pair.target} {pair.address}" for pair in left[:10])
        raise LabError(f"{what} of lab {self.name}: no answer {silent}; see the logs in {self.state}")

    def _save(self) -> None:
        state.save(self._base, self.settings)

    def _locked(self, create: bool = False) -> AbstractContextManager[None]:
        return state.locked(self._base, self.name, create)

    # --- the mesh

    def mesh_text(self, nodes: Sequence[Mapping[str, Any]] | None = None, **spec: Any) -> str:
        """Return a mesh file with these nodes, or those of all hosts; `spec` overrides or adds."""
        chosen = [host.node for host in self.hosts] if nodes is None else nodes
        return state.mesh_text(self.settings, chosen, spec)

    def write_mesh(self, nodes: Sequence[Mapping[str, Any]] | None = None, **spec: Any) -> None:
        """Write `mesh_text()` as the mesh file of all hosts, by an atomic rename."""
        self.write_mesh_text(self.mesh_text(nodes, **spec))

    def write_mesh_text(self, text: str) -> None:
        """Write any text as the mesh file, good or bad, by an atomic rename."""
        write(self.mesh_file, text)

    def converged(self, timeout: float = 60.0, hosts: Sequence[Host] | None = None, thorough: bool = False) -> float:
        """Wait until /readyz of every host's agent says 200, and return the seconds waited.

        An agent may not have noticed yet what was changed a moment ago: `thorough` also waits until
        `ovsmesh plan` finds nothing to change. Raises LabError after `timeout` seconds, with what
        the first agents that are not ready say.
        """
        start = time.monotonic()
        waiting = list(self.hosts if hosts is None else hosts)

        def ready() -> bool:
            waiting[:] = [host for host in waiting if not host.ready()]
            if ended := [host for host in waiting if not host.agent_alive()]:
                waiting[:] = ended
                raise LabError(f"agents that should be ready have ended: {', '.join(host.name for host in ended)}")
            if thorough and not waiting:
                chosen = list(self.hosts if hosts is None else hosts)
                plans = self._each(lambda host: host.ovsmesh("plan").returncode, chosen)
                waiting[:] = [host for host, code in zip(chosen, plans, strict=True) if code]
            return not waiting

        try:
            netns.wait_for("all agents to be ready", ready, timeout, every=0.05)
        except LabError as error:
            raise LabError("\n".join([str(error), *(self._unready(host) for host in waiting[:3])])) from error
        return time.monotonic() - start

    def _unready(self, host: Host) -> str:
        status, body = host.http("/readyz")
        alive = "runs" if host.agent_alive() else "HAS ENDED"
        return (
            f"{host.name}: agent {alive}, /readyz {status or 'no answer'}: {body.strip()[:500]}; log {host.agent_log}"
        )

    def add_host(self) -> Host:
        """Add a host to the lab and to the mesh file, and plug its pods in once all agents are ready."""
        with self._locked():
            host = self.prepare_host()
            self.write_mesh()
            host.start_agent()
            self.converged(30)
            host.plug()
            self.warm_up()
        return host

    def prepare_host(self) -> Host:
        """Add a host with Open vSwitch but no agent. It is not in the mesh file, and its pods are not plugged in."""
        index = next(n for n in range(1, MOST_HOSTS + 2) if n not in self.settings.hosts)
        if index > MOST_HOSTS:
            raise LabError(f"lab {self.name} has {MOST_HOSTS} hosts already, the most that are possible")
        self.settings = replace(self.settings, hosts=(*self.settings.hosts, index))
        self._save()
        host = self._host(index)
        underlay.join(self.settings, [host])
        self._start_host(host)
        self._reach_underlay()
        return host

    def remove_host(self, index: int) -> None:
        """Take a host out of the mesh file, then end it."""
        host = self.host(index)
        with self._locked():
            self.settings = replace(self.settings, hosts=tuple(n for n in self.settings.hosts if n != index))
            self._save()
            self.write_mesh()
            self._end(name for name in netns.namespaces() if re.fullmatch(rf"{host.ns}(p\d+)?", name))
            shutil.rmtree(host.state, ignore_errors=True)

    # --- packets

    def pairs(self, between_hosts_only: bool = False) -> list[Pair]:
        """Return every pod with every other, in each address family that they have."""
        places = [(host.index, pod) for host in self.hosts for pod in host.pods]
        return [
            Pair(a.ns, str(address), a.name, b.name)
            for host_a, a in places
            for host_b, b in places
            if a != b and not (between_hosts_only and host_a == host_b)
            for address in b.addresses
        ]

    def ping_matrix(
        self, count: int = 3, size: int = 0, df: bool = False, pace: float = 0.0005, timeout: float = 1.0
    ) -> list[Track]:
        """Ping from every pod to every other, `count` times."""
        return ping(self.pairs(), count, pace, size, df, timeout)

    def stream(self, pairs: Sequence[Pair] | None = None, interval: float = 0.005, grace: float = 0.3) -> Prober:
        """Return a stream that runs while its context lasts: one packet for each pair each `interval` seconds.

        A packet that is not answered `grace` seconds after it was sent is lost.
        """
        return Prober(self.pairs(between_hosts_only=True) if pairs is None else pairs, interval, grace=grace)

    def pair(self, source: Pod, target: Pod, version: int = 4) -> Pair:
        """Return two pods as a pair to ping, in one address family."""
        address = next(a for a in target.addresses if a.version == version)
        return Pair(source.ns, str(address), source.name, target.name)

    def logs(self, lines: int = 40) -> str:
        """Return the last lines of all hosts' logs."""
        return "\n".join(host.logs(lines) for host in self.hosts)

    # --- down

    def down(self) -> Proof:
        """End every process of the lab, remove its namespaces and files, and look what is left.

        Works on a half-made lab, and after its maker was killed. Ends the processes in the lab's namespaces
        and the recorded ones that are still the same.
        """
        with self._locked():
            recorded = [p for host in self._recorded_hosts() for p in _recorded(host)]
            processes = netns.end(recorded)
            more, removed = self._end(own(self.name))
            shutil.rmtree(self.state, ignore_errors=True)
        if self._base == BASE and BASE.exists() and not any(BASE.iterdir()):
            BASE.rmdir()
        return Proof(self.name, len(processes) + more, removed, state.left_of(self._base, self.name))

    def _recorded_hosts(self) -> list[Host]:
        found = (re.fullmatch(r"h(\d+)", path.name) for path in self.state.glob("h*"))
        return [self._host(int(match[1])) for match in found if match]

    def _end(self, names: Iterable[str]) -> tuple[int, int]:
        chosen, ended = sorted(names), 0
        # again while something is found: a process may have started another one meanwhile
        while found := netns.inhabitants(chosen):
            ended += len(netns.end(found))
        if chosen:
            netns.ip_batch(f"netns del {name}" for name in chosen)
        return ended, len(chosen)


def end_orphans(base: Path = BASE) -> list[Proof]:
    """End the ephemeral labs whose maker has ended without doing it."""
    proofs = []
    for name in names(base):
        try:
            lab = Lab.open(name, base)
        except LabError:
            # its maker has just ended it
            continue
        if (maker := lab.settings.owner) and netns.identity(maker.pid) != maker:
            proofs.append(lab.down())
    return proofs


def _recorded(host: Host) -> list[Process]:
    found = (host.agent(), host.daemon("ovs-vswitchd"), host.daemon("ovsdb-server"))
    return [process for process in found if process]
