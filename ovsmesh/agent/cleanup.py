"""Remove all that is managed on this node, put back what was there before, and prove it."""

from __future__ import annotations

import time

from ovsmesh.agent.driver import Driver
from ovsmesh.agent.options import Options, opened
from ovsmesh.dataplane.plan import Plan, plan
from ovsmesh.dataplane.types import KBR, KINDS, OBR, Dataplane, Observed
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir

_STEP = 0.2
_SETTLE = 10.0
"""Seconds for obr0's device to go: at once with a thousand ports, 5 s and more with five thousand."""
_PROOF = tuple(kind for kind in KINDS if kind not in ("sysctls", "restore_wait"))


def cleanup(options: Options, dry_run: bool) -> tuple[list[str], bool]:
    """Remove all that is managed. Return what was done and the proof, as lines, and whether nothing is left.

    Raise OvsmeshError while an agent runs with this state directory: it would make everything again.
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
    """Do as cleanup() does, as the holder of the state directory's lock."""
    with opened(options, state, removing=True) as driver:
        before, problems = state.before()
        # settings of kbr0 go with it
        want = Dataplane(sysctls={key: value for key, value in before.items() if f"/{KBR}/" not in key})
        have, todo = _look(driver, want)
        todo = _without_shared_bridge(todo, have)
        steps = [str(step._replace(why="")) for step in todo.steps]
        if dry_run:
            stays = driver.docker.stays() if driver.docker else ""
            lines = [*steps, f"! {stays}"] if stays else steps
            return [*lines, f"{len(steps)} parts would be removed or restored"], not stays
        failed = _restore_docker(driver)
        pods = driver.pods() if KBR in have.dataplane.links else []
        failed += driver.apply(todo, want) if todo.steps else []
        have, left = _settle(driver, want)
        if left.steps and {step.kind for step in left.steps} == {"links"} and not have.unknown:
            failed += driver.apply(_without_shared_bridge(left, have), want)
            have, left = _settle(driver, want)
    lines = [*steps, *(f"! {problem}" for problem in (*problems, *failed, *have.problems))]
    lines += [f"left alone: {f.detail}" for f in have.unmanaged]
    if pods:
        lines.append(f"left without a bridge, as {KBR} is gone: {', '.join(pods)}")
    counts = [f"{len(getattr(have.dataplane, kind))} {kind.replace('_', ' ')}" for kind in _PROOF]
    lines.append(f"proof, read back from the system: {', '.join(counts)}")
    guests = [str(f.key) for f in have.unmanaged if f.kind == "ports"]
    if guests:
        lines.append(f"{OBR} stays: {', '.join(guests)} in it is unmanaged. Move that, then run this again")
    clean = not left.steps and not any(p.fatal for p in failed) and not have.unknown
    if clean:
        lines += [f"left in the state directory: {name}" for name in state.remove()]
        restored = sum(step.kind == "sysctls" for step in todo.steps)
        lines.append(f"nothing of ovsmesh is left; {restored} sysctls are as they were")
    else:
        lines += [f"still there: {step}" for step in left.steps]
        lines += [f"can't be seen: {kind}" for kind in sorted(have.unknown)]
    return lines, clean


def _look(driver: Driver, want: Dataplane) -> tuple[Observed, Plan]:
    have = driver.observe(want)
    return have, plan(want, have, confirmed=True)


def _restore_docker(driver: Driver) -> list[Problem]:
    """Move Docker back before its bridge is removed. Return what failed; raise OvsmeshError if nothing was changed."""
    docker = driver.docker
    if docker is None:
        return []
    if why := docker.stays():
        raise OvsmeshError(why)
    notes = [Problem(Reason.Docker, text) for text in docker.restore()]
    while driver.busy:
        # a restart has its own deadlines
        driver.wait((), _STEP)
        driver.drain()
    why = docker.restored()
    return [Problem(Reason.DockerNotRestored, why), *notes] if why else notes


def _settle(driver: Driver, want: Dataplane) -> tuple[Observed, Plan]:
    """Return what is left once ovs-vswitchd had its time: it reports a bridge's end before it removes the device."""
    end = time.monotonic() + _SETTLE
    while True:
        driver.dirty()
        have, left = _look(driver, want)
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
