"""Remove everything that is managed on this node, put back what was there before, and prove it."""

from __future__ import annotations

import time

from ovsmesh.agent.driver import Driver
from ovsmesh.agent.options import Options, opened
from ovsmesh.containers.docker import Docker
from ovsmesh.dataplane.plan import Plan, plan
from ovsmesh.dataplane.types import KBR, KINDS, OBR, Dataplane, Observed
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir

_STEP = 0.2
_SETTLE = 10.0
"""Seconds for obr0's device to go: at once for a thousand ports, 5 s and more for five thousand."""
_PROOF = tuple(kind for kind in KINDS if kind not in ("sysctls", "restore_wait"))


def cleanup(options: Options, dry_run: bool) -> tuple[list[str], bool]:
    """Removes all of ours; what it did and the proof, as lines, and whether nothing is left.

    Raises OvsmeshError while an agent runs with this state directory: it would put all back.
    """
    state = StateDir(options.state_dir)
    if dry_run:
        return remove(options, state, dry_run)
    state.lock()
    try:
        return remove(options, state)
    finally:
        state.unlock()


def remove(options: Options, state: StateDir, dry_run: bool = False) -> tuple[list[str], bool]:
    """As cleanup, for who holds the state directory already."""
    with opened(options, state, removing=True) as host:
        return _cleanup(host, state, dry_run)


def _cleanup(host: Driver, state: StateDir, dry_run: bool) -> tuple[list[str], bool]:
    before, problems = state.before()
    # a setting of kbr0's own goes with it
    want = Dataplane(sysctls={key: value for key, value in before.items() if f"/{KBR}/" not in key})
    have = host.observe(want)
    todo = _spared(plan(want, have, confirmed=True), have)
    steps = [str(step._replace(why="")) for step in todo.steps]
    if dry_run:
        stays = [f"! {text}" for text in [host.docker.stays()] if text] if host.docker else []
        return [*steps, *stays, f"{len(steps)} parts would be removed or restored"], not stays
    moved = _restore_docker(host.docker, host) if host.docker else []
    pods = [name for name in host.net.mirror.ports_of(KBR) if name != OBR] if KBR in have.dataplane.links else []
    failed = [*moved, *(host.apply(todo, want) if todo.steps else [])]
    have, left = _settled(host, want)
    if left.steps and {step.kind for step in left.steps} == {"links"} and not have.unknown:
        failed += host.apply(_spared(left, have), want)
        have, left = _settled(host, want)
    lines = [*steps, *(f"! {problem}" for problem in (*problems, *failed, *have.problems))]
    lines += [f"left alone: {f.detail}" for f in have.unmanaged]
    if pods:
        lines.append(f"left without a bridge, as {KBR} is gone: {', '.join(pods)}")
    counts = [f"{len(getattr(have.dataplane, kind))} {kind.replace('_', ' ')}" for kind in _PROOF]
    lines.append(f"proof, read back from the system: {', '.join(counts)}")
    guests = [f.key for f in have.unmanaged if f.kind == "ports"]
    if guests:
        lines.append(f"{OBR} stays, as {', '.join(map(str, guests))} in it is not ours: move that, then run this again")
    clean = not left.steps and not any(p.fatal for p in failed) and not have.unknown
    if clean:
        lines += [f"left in the state directory: {name}" for name in state.remove()]
        restored = sum(step.kind == "sysctls" for step in todo.steps)
        lines.append(f"nothing of ovsmesh is left; {restored} sysctls are as they were")
    else:
        lines += [f"still there: {step}" for step in left.steps]
        lines += [f"can't be seen: {kind}" for kind in sorted(have.unknown)]
    return lines, clean


def _restore_docker(docker: Docker, host: Driver) -> list[Problem]:
    """Docker back to where it was, before the bridge under it goes. Raises OvsmeshError where nothing was changed."""
    why = docker.stays()
    if why:
        raise OvsmeshError(why)
    told = docker.restore()
    while host.busy:
        # a restart has deadlines of its own
        host.wait((), _STEP)
        host.drain()
    return [Problem(Reason.DockerNotRestored, text) for text in [docker.restored()] if text] + [
        Problem(Reason.Docker, text) for text in told
    ]


def _settled(host: Driver, want: Dataplane) -> tuple[Observed, Plan]:
    """What is left, once ovs-vswitchd has had its time: it tells of a bridge's end before the device goes."""
    end = time.monotonic() + _SETTLE
    while True:
        host.dirty()
        have = host.observe(want)
        left = _spared(plan(want, have, confirmed=True), have)
        if not left.steps or time.monotonic() > end or any(step.kind != "links" for step in left.steps):
            return have, plan(want, have, confirmed=True)
        host.wait((), end - time.monotonic())
        host.drain()


def _spared(todo: Plan, have: Observed) -> Plan:
    """Without the end of obr0 while a port of someone else is in it, which would end too."""
    if not any(f.kind == "ports" for f in have.unmanaged):
        return todo
    return Plan(tuple(step for step in todo.steps if step.key != OBR))
