"""Remove all that is managed on this node, put back what was there before, and prove it.

It refuses to begin where it can't see what it would remove.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping

from ovsmesh.agent.driver import Driver
from ovsmesh.agent.options import Options, opened
from ovsmesh.containers.cni import Cni
from ovsmesh.containers.docker import Docker
from ovsmesh.containers.forwarding import FORWARDING, Device, configured, forwarding_users
from ovsmesh.dataplane import cni_config
from ovsmesh.dataplane.plan import Plan, plan
from ovsmesh.dataplane.types import KBR, KINDS, OBR, Dataplane, Observed
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.names import DEFAULT_OVSDB
from ovsmesh.processes import running
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir, sole_writer
from ovsmesh.sysctl import read_sysctls, write_sysctl
from ovsmesh.text import listed

_STEP = 0.2
_SETTLE = 10.0
"""Seconds for obr0's device to go: at once with a thousand ports, 5 s and more with five thousand."""
_WRITTEN = {"ip_forward": "1", "forwarding": "1", "send_redirects": "0", "accept_redirects": "0", "accept_ra": "2"}
"""What ovsmesh and, with forwarding, the kernel have set: last part of a sysctl's name → value."""
_PROOF = tuple(kind for kind in KINDS if kind not in ("sysctls", "restore_wait"))
_SWITCH = frozenset({"bridges", "ports", "flows", "restore_wait"})
"""Kinds that Open vSwitch holds."""
_CNI_DIR = "/etc/cni/net.d"
"""Where a conflist is looked for if no agent with this state directory had one."""
_DATABASES = ("/etc/openvswitch/conf.db", "/var/lib/openvswitch/conf.db")
"""Where packages keep the database. A package that is removed leaves it."""
_MOST_BYTES = 64 << 20
_NEVER_RAN = (
    "no agent has run with the state directory {}: what sysctls and Docker were before is not known, and they stay as "
    "they are. If the agent had another one, give --state-dir"
)


def cleanup(options: Options, dry_run: bool) -> tuple[list[str], bool]:
    """Remove all that is managed. Return what was done and the proof, as lines, and whether nothing is left.

    Raise OvsmeshError while an agent runs in this network namespace: it would make everything again. Raise it before
    anything is changed where something can't be seen.
    """
    state = StateDir(options.state_dir)
    if dry_run:
        return remove(options, state, dry_run)
    with sole_writer():
        state.lock()
        try:
            return remove(options, state)
        finally:
            state.unlock()


def remove(options: Options, state: StateDir, dry_run: bool = False) -> tuple[list[str], bool]:
    """Do as cleanup() does, as the holder of the state directory's lock."""
    with opened(options, state, removing=True) as driver:
        before, problems = state.before()
        sysctls, left_on = put_back(before, driver.devices(), driver.docker is not None and driver.docker.returns())
        want = Dataplane(sysctls=sysctls)
        absent = frozenset() if driver.database_up or _signs(driver, options) else _SWITCH
        have, todo = _look(driver, want, absent)
        unseen = [*_unseen(driver, options, have), *(f"{p}. To go on without them, remove that file" for p in problems)]
        if unseen:
            text = "nothing was changed, as cleanup can't see all that it would remove:"
            raise OvsmeshError("\n  ".join([text, *unseen, f"seen so far: {_counts(driver, have)}"]))
        todo = _without_shared_bridge(todo, have)
        steps = [str(step._replace(why="")) for step in todo.steps]
        notes = [f"! {_NEVER_RAN.format(state.path)}"] if steps and not before and not state.agent() else []
        if dry_run:
            stays = driver.docker.stays() if driver.docker else ""
            lines = [*steps, *notes, *([f"! {stays}"] if stays else [])]
            return [*lines, *left_on, f"{len(steps)} parts would be removed or restored"], not stays
        failed = _restore_docker(driver, todo, sysctls)
        pods = driver.pods() if KBR in have.dataplane.links else []
        restored = sum(step.kind == "sysctls" for step in todo.steps)
        # whoever has set one since then keeps it
        want, todo = Dataplane(), Plan(tuple(step for step in todo.steps if step.kind != "sysctls"))
        failed += driver.apply(todo, want) if todo.steps else []
        have, left = _settle(driver, want, absent)
        if left.steps and {step.kind for step in left.steps} == {"links"} and not have.unknown:
            failed += driver.apply(_without_shared_bridge(left, have), want)
            have, left = _settle(driver, want, absent)
        lines = [*steps, *notes, *(f"! {problem}" for problem in (*failed, *have.problems))]
        lines += left_on
        lines += [f"left alone: {f.detail}" for f in have.unmanaged]
        if pods:
            lines.append(f"left without a bridge, as {KBR} is gone: {', '.join(pods)}")
        lines.append(f"proof, read back from the system: {_counts(driver, have)}")
    guests = [str(f.key) for f in have.unmanaged if f.kind == "ports"]
    if guests:
        lines.append(f"{OBR} stays: {', '.join(guests)} in it is unmanaged. Move that, then run this again")
    clean = not left.steps and not any(p.fatal for p in failed) and not have.unknown
    if absent:
        lines.append("Open vSwitch is not installed here any more, so it has no bridge, port or flow")
        if databases := [path for path in _DATABASES if _names_bridge(path)]:
            text = f"still there: bridge {OBR} in {listed(databases)}, and it comes back with Open vSwitch"
            lines.append(f"{text}; remove that file, or run this again then")
            clean = False
    if clean:
        lines += [f"left in the state directory: {name}" for name in state.remove()]
        lines.append(f"nothing of ovsmesh is left; {'?' if notes else restored} sysctls are as they were")
    else:
        lines += [f"still there: {step}" for step in left.steps]
        lines += [f"can't be seen: {kind}" for kind in sorted(have.unknown)]
    return lines, clean


def _look(driver: Driver, want: Dataplane, absent: frozenset[str]) -> tuple[Observed, Plan]:
    """Return what there is, and the plan to remove it. `absent`: kinds of which there is nothing, though unseen."""
    have = driver.observe(want)
    if absent:
        problems = tuple(p for p in have.problems if p.reason is not Reason.DatabaseDown)
        have = dataclasses.replace(have, problems=problems, unknown=have.unknown - absent)
    return have, plan(want, have, confirmed=True)


def _counts(driver: Driver, have: Observed) -> str:
    """Return how much of each kind there is, as "0 bridges, ? ports"; nothing of what was not looked at."""
    kinds = [kind for kind in _PROOF if kind != "docker" or driver.docker]
    numbers = {kind: "?" if kind in have.unknown else len(getattr(have.dataplane, kind)) for kind in kinds}
    return ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in numbers.items())


# What can't be seen


def _unseen(driver: Driver, options: Options, have: Observed) -> Iterator[str]:
    """Yield what may be there and can't be seen: each source by a text that says what to do."""
    if not driver.database_up:
        if signs := _signs(driver, options):
            elsewhere = options.ovsdb != DEFAULT_OVSDB and os.path.exists(DEFAULT_OVSDB.partition(":")[2])
            yield (
                f"bridges, ports and flows: ovsdb-server does not answer at {options.ovsdb}. Start Open vSwitch "
                f"(systemctl start openvswitch-switch), or give --ovsdb its socket"
                f"{f' ({DEFAULT_OVSDB} is there)' if elsewhere else ''}. "
                f"It does not look as if Open vSwitch were gone for good: {signs}"
            )
    elif "flows" in have.unknown:
        why = next((str(p) for p in have.problems if p.reason is Reason.SwitchUnseen), "")
        yield (
            f"flows: {why or f'ovs-vswitchd does not answer on {OBR}'}; start it (systemctl start openvswitch-switch): "
            f"without it, {OBR}'s link and its tunnels stay"
        )
    elif OBR in have.dataplane.links and not _has_bridge(have) and driver.net.carrier(OBR):
        yield (
            f"bridges, ports and flows: the link {OBR} is in use, and the database at {options.ovsdb} has no bridge "
            f"{OBR}: it is another Open vSwitch's; give --ovsdb the socket of that one"
        )
    yield from (f"rules: {text}" for text in driver.firewall.unseen())
    if "docker" in have.unknown:
        text = have.docker or f"the daemon at {options.docker_socket} does not answer"
        yield f"docker: {text}; run this again when it is up or stopped"
    yield from (f"cni: {p.message}" for p in have.problems if p.reason is Reason.CNIUnreadable)
    if not options.cni_dir and cni_config.FILE in Cni(_CNI_DIR).observe()[0]:
        yield f"cni: {_CNI_DIR} has the conflist {cni_config.FILE}; give --cni-dir {_CNI_DIR}"


def _has_bridge(have: Observed) -> bool:
    return OBR in have.dataplane.bridges or any(f.kind == "bridges" for f in have.unmanaged)


def _signs(driver: Driver, options: Options) -> str:
    """Return what shows that Open vSwitch is on this host, though its database does not answer; "" if nothing does."""
    socket = options.ovsdb.partition(":")[2]
    if os.path.exists(socket):
        return f"{socket} is there"
    if program := shutil.which("ovs-vswitchd"):
        return f"{program} is installed"
    if driver.net.present(OBR):
        return f"the link {OBR} is there (restart this host; a tap device goes with `ip link del {OBR}`)"
    pid = _vswitchd()
    return f"ovs-vswitchd runs as pid {pid}" if pid else ""


def _vswitchd() -> str:
    """Return the pid of an ovs-vswitchd in this network namespace, "" if none is seen."""
    return next((str(pid) for pid, _ in running(("ovs-vswitchd",))), "")


def _names_bridge(path: str) -> bool:
    """Return whether a database that nobody serves has the bridge."""
    try:
        with open(path, "rb") as file:
            return f'"{OBR}"'.encode() in file.read(_MOST_BYTES)
    except OSError:
        return False


# Doing it


def put_back(
    before: Mapping[str, str], devices: Iterable[Device], docker_returns: bool
) -> tuple[dict[str, str], list[str]]:
    """Return the sysctls to put back, those of forwarding first, and a line for each that others depend on by now.

    `before`: their values before ovsmesh. `docker_returns`: see forwarding_users.
    """
    # settings of kbr0 go with it; what the kernel sets together with forwarding comes after that
    keys = sorted((key for key in before if f"/{KBR}/" not in key), key=lambda key: (key not in FORWARDING, key))
    now = read_sysctls(keys)
    devices = list(devices)
    back: dict[str, str] = {}
    left: list[str] = []
    on: set[int] = set()
    """IP versions whose forwarding stays."""
    for key in (key for key in keys if key in now):
        version, last = 6 if key.startswith("net/ipv6/") else 4, key.rpartition("/")[2]
        why = ""
        if now[key] != before[key]:
            written = _WRITTEN.get(last)
            if key in FORWARDING:
                why = listed(forwarding_users(version, devices, docker_returns), 3, "; ")
            elif version in on and last == "accept_ra":
                why = "this host forwards IPv6, and would lose its default route"
            if written not in (None, now[key]):
                why = "somebody else has set it"
            elif path := configured(key, now[key]):
                why = f"{path} sets it"
        if why:
            left.append(f"sysctl {key} left at {now[key]}: {why}")
            on |= {version} if key in FORWARDING else set()
        elif not (version in on and last in ("forwarding", "accept_redirects")):
            back[key] = before[key]
    return back, left


def _write_back(sysctls: Mapping[str, str]) -> list[Problem]:
    """Write sysctls, and those last that the kernel has changed with another. Return what failed."""
    failed = []
    for _ in range(2):
        now = read_sysctls(sysctls)
        for key, value in sysctls.items():
            if now.get(key, value) != value:
                try:
                    write_sysctl(key, value)
                except OvsmeshError as error:
                    failed.append(Problem(Reason.ApplyFailed, str(error)))
        if failed:
            break
    return failed


def _restore_docker(driver: Driver, todo: Plan, sysctls: Mapping[str, str]) -> list[Problem]:
    """Put sysctls back, then move Docker back before its bridge is removed, as a dockerd that starts sets them itself.

    Return what failed; raise OvsmeshError if nothing was changed.
    """
    docker = driver.docker
    if docker is not None and (why := docker.stays()):
        raise OvsmeshError(why)
    failed = _write_back(sysctls)
    if docker is None:
        return failed
    # a dockerd that is not started again does not set it either
    on = {step.key: step.have for step in todo.steps if step.key in FORWARDING and step.have == "1"}
    try:
        failed += _move_docker(driver, docker)
    except OvsmeshError:
        _write_back(on)
        raise
    if any(problem.fatal for problem in failed):
        failed += _write_back(on)
    return failed


def _move_docker(driver: Driver, docker: Docker) -> list[Problem]:
    """Move Docker back. Return what failed, and what is to be said of it."""
    notes = [Problem(Reason.Docker, text) for text in docker.restore()]
    while driver.busy:
        # a restart has its own deadlines
        driver.wait((), _STEP)
        driver.drain()
    why = docker.restored()
    return [Problem(Reason.DockerNotRestored, why), *notes] if why else notes


def _settle(driver: Driver, want: Dataplane, absent: frozenset[str]) -> tuple[Observed, Plan]:
    """Return what is left once ovs-vswitchd had its time: it reports a bridge's end before it removes the device."""
    end = time.monotonic() + _SETTLE
    while True:
        driver.dirty()
        have, left = _look(driver, want, absent)
        steps = _without_shared_bridge(left, have).steps
        if not steps or time.monotonic() > end or any(step.kind != "links" for step in steps):
            return have, left
        driver.wait((), end - time.monotonic())
        driver.drain()


def _without_shared_bridge(todo: Plan, have: Observed) -> Plan:
    """Return the plan without the removal of obr0 while an unmanaged port is in it: the port would go too."""
    if not any(f.kind == "ports" for f in have.unmanaged):
        return todo
    return Plan(tuple(step for step in todo.steps if step.key != OBR))
