"""Knows what this node's MeshNode says and when it is worth a write: a thousand agents share one API server.

A Publisher of the agent's loop, which it never delays: a thread of its own writes. Imports kube, the pure rooms
and turn; never ovs or pyroute2.
"""

from __future__ import annotations

import logging
import platform
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ovsmesh import __version__
from ovsmesh.agent.result import AgentCounters, ReconcileResult, report
from ovsmesh.dataplane import report as reports
from ovsmesh.errors import OvsmeshError
from ovsmesh.kube.client import AlreadyExists, Api, Conflict, NotFound, Object, path_of
from ovsmesh.kube.http import ApiError
from ovsmesh.names import API_VERSION, MESH_NODE, MESH_NODES
from ovsmesh.reasons import Reason

log = logging.getLogger("ovsmesh")

EVERY = 300.0
"""Seconds between writes when nothing changes: how old a healthy node's MeshNode may be."""
AT_LEAST = 30.0
"""Seconds between writes unless a condition flips."""
_FLIP = 1.0
"""Seconds between writes even then: a node that flaps must not write whenever it does."""
CHECK = 300.0
"""Seconds after which it is read whether what was written still is there: it may be deleted or edited by hand.
Read, not watched: an agent may read MeshNodes by name only. And seldom: at rest it hears nothing but bookmarks."""
_FIRST_CHECK = 10.0
"""The same for one that was just made: where a Node comes back, those who clear up after the earlier one are busy."""
_BACKOFF = (0.5, 60.0)
_GONE = 4.0
"""Seconds between two looks whether an earlier Node's MeshNode is gone, at most."""
_CONDITIONS = ("Converged", "Degraded")


_Told = tuple[ReconcileResult, str, dict[str, str]]
"""A turn, the version of OVS, and the slices that the turn's mesh was made of."""


class MeshNodeWriter:
    """Writes the status of the MeshNode of `node`, and makes it where it is absent.

    `observed` gives the resourceVersions of the slices that the turn just published was made of; it is called
    in the loop's thread.
    """

    def __init__(
        self,
        api: Api,
        node: str,
        observed: Callable[[], Mapping[str, str]],
        *,
        every: float = EVERY,
        at_least: float = AT_LEAST,
        flip: float = _FLIP,
        check: float = CHECK,
    ) -> None:
        self._api, self._node, self._observed = api, node, observed
        # a thousand agents that started together must not write together for ever
        self._every, self._at_least, self._flip = every * random.uniform(0.8, 1.0), at_least, flip
        self._new = False
        self._check_every, self._check_at = check * random.uniform(0.8, 1.0), float("inf")
        self._path = path_of(MESH_NODES, node)
        self._wake = threading.Condition()
        self._turn: _Told | None = None
        self._seen: _Told | None = None
        self._made: Object = {}
        self._made_of: _Told | None = None
        self._stopping = False
        self._mood: object = None
        self._written: Object = {}
        self._written_at = float("-inf")
        self._known = False
        self._uid = ""
        """Of our Node, as the mesh has it."""
        self._told = ""
        self._wait = 0.0
        self.writes = 0
        """Writes that were accepted."""
        self._thread = threading.Thread(target=self._run, name="meshnode", daemon=True)
        self._thread.start()

    def publish(self, turn: ReconcileResult, runtime: AgentCounters) -> None:
        # a wait for the first word of the API server says nothing of the node
        if turn.mesh is None and any(p.reason == Reason.MeshWaiting for p in turn.problems):
            return
        with self._wake:
            self._turn = turn, runtime.ovs_version, dict(self._observed())
            self._wake.notify()

    def flush(self) -> None:
        return

    def close(self, timeout: float = 2.0) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._turn is not self._seen, self._pause())
                if self._stopping:
                    return
                self._seen = self._turn
            if self._seen is not None:
                self._step(self._seen)
            if time.monotonic() >= self._check_at:
                self._check()

    def _step(self, now: _Told) -> None:
        me = now[0].mesh.node(self._node) if now[0].mesh else None
        if me is not None and me.uid != self._uid:
            # a Node made again with this name: the MeshNode of the one before goes with it
            self._uid, self._known, self._written = me.uid, False, {}
            self._mood = None
        # the report of a thousand peers costs the loop's time too, so it is made only for a write that may be due
        if now is not self._made_of and (_mood(now[0]) != self._mood or time.monotonic() >= self._routine()):
            self._make(now)
        if self._made and time.monotonic() >= self._due(self._made):
            if now is not self._made_of:
                self._make(now)
            if time.monotonic() >= self._due(self._made):
                self._write(self._made)

    def _make(self, now: _Told) -> None:
        self._made, self._made_of, self._mood = self._status(*now), now, _mood(now[0])

    def _routine(self) -> float:
        """When a change that flips nothing may be written (monotonic seconds)."""
        return self._written_at + max(self._at_least, self._wait)

    def _due(self, made: Object) -> float:
        """When the status `made` may be written (monotonic seconds)."""
        if not self._written:
            after = 0.0
        elif _flipped(made, self._written):
            after = self._flip
        else:
            after = self._every if _same(made, self._written) else self._at_least
        return self._written_at + max(after, self._wait)

    def _pause(self) -> float | None:
        """Seconds until there may be something to do without a new turn; None: there is not."""
        times = [self._check_at] if self._check_at != float("inf") else []
        times += [self._due(self._made)] if self._made else []
        if self._seen is not self._made_of:
            times.append(self._routine())
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _status(self, turn: ReconcileResult, ovs: str, slices: Mapping[str, str]) -> Object:
        about = reports.Context(now=time.time(), agent_version=__version__, ovs_version=ovs, mesh_current=turn.whole)
        made = report(turn, self._node, {}, about)
        refused = made.count("refused")
        wanted = made.count("wanted")
        ports = turn.have.dataplane.ports if turn.have is not None else {}
        have = {port.node for port in ports.values()}
        installed = sum(peer.name in have for peer in made.peers if peer.state not in ("refused", "held"))
        conditions = [
            {"type": c.type, "status": c.status, "reason": c.reason, "message": c.message[:1000]}
            for c in made.conditions
            if c.type in _CONDITIONS
        ]
        if refused:
            conditions[-1]["message"] = f"{conditions[-1]['message']}; {refused} peers refused"
        return {
            "observedSlices": dict(slices),
            "peers": {"wanted": wanted, "installed": installed, "up": made.count("ok")},
            "mtu": made.self.mtu,
            "versions": {"agent": __version__, "ovs": ovs, "kernel": platform.release()[:128]},
            "conditions": conditions,
        }

    def _write(self, made: Object) -> None:
        try:
            if not self._known:
                self._look()
            now = reports.timestamp(time.time())
            body = {**made, "observedAt": now, "conditions": _dated(made, self._written, now)}
            gone = dict.fromkeys((self._written.get("observedSlices") or {}).keys() - made["observedSlices"].keys())
            sent = {**body, "observedSlices": {**made["observedSlices"], **gone}}
            self._api.patch(path_of(self._path, "status"), {"status": sent})
        except NotFound as error:
            # deleted by hand, or with the Node of an earlier uid: made again at once, later if that is no use
            self._failed(error, 0.0 if self._known else _BACKOFF[0])
            self._known, self._written = False, {}
        except Conflict as error:
            # no trouble, but a wait for Kubernetes' garbage collector
            self._failed(error, _BACKOFF[0], _GONE)
        except OvsmeshError as error:
            self._failed(error, _BACKOFF[0])
        else:
            self.writes += 1
            self._written, self._written_at, self._wait = body, time.monotonic(), 0.0
            self._check_at = self._written_at + (
                min(_FIRST_CHECK, self._check_every) if self._new else self._check_every
            )
            self._new = False
            if self._told:
                log.info("no longer: %s", self._told)
            self._told = ""

    def _check(self) -> None:
        """Has it written again, at once, where it is gone or says something else than we wrote."""
        self._check_at = time.monotonic() + self._check_every
        try:
            found = self._api.get(self._path).get("status")
        except NotFound:
            log.warning("MeshNode: is gone, and is made again")
            self._known, self._written = False, {}
        except OvsmeshError:
            return  # the next write tells of it, if it is still so
        else:
            there: Object = found if isinstance(found, dict) else {}
            if all(there.get(key) == value for key, value in self._written.items()):
                return
            log.warning("MeshNode: says something else than was written, and is written again")
            self._written = there
        self._written_at = float("-inf")

    def _failed(self, error: OvsmeshError, least: float, most: float = _BACKOFF[1]) -> None:
        asked = error.retry_after if isinstance(error, ApiError) else 0.0
        self._wait = max(asked, min(most, max(least, self._wait * 2)) * random.uniform(0.5, 1.0))
        self._written_at = time.monotonic()
        if str(error) != self._told:
            self._told = str(error)
            log.warning("MeshNode: %s", error)

    def _look(self) -> None:
        """Learns what an earlier run wrote, as the conditions' times go on from there; makes a MeshNode if need be."""
        try:
            found = self._api.get(self._path)
        except NotFound:
            metadata: dict[str, Any] = {"name": self._node}
            if self._uid:
                # the MeshNode goes with its Node
                metadata["ownerReferences"] = [_owner(self._node, self._uid)]
            made = {"apiVersion": API_VERSION, "kind": MESH_NODE, "metadata": metadata, "spec": {}}
            try:
                found = self._api.create(MESH_NODES, made)
                self._new = True
            except AlreadyExists:
                found = self._api.get(self._path)
        if _is_of_another(found, self._uid):
            message = f"{self._path} belongs to an earlier Node of this name: to be made anew once it is gone"
            raise Conflict(f"{message} (Kubernetes removes it; or `kubectl delete meshnode {self._node}`)")
        before = found.get("status")
        self._written = before if isinstance(before, dict) else {}
        self._known = True


def _owner(node: str, uid: str) -> dict[str, str]:
    return {"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid}


def _is_of_another(found: Object, uid: str) -> bool:
    """Whether all its owners are other objects than the Node with this uid: then it is about to be removed."""
    owners = found.get("metadata", {}).get("ownerReferences") or ()
    return bool(uid and owners) and all(owner.get("uid") != uid for owner in owners if isinstance(owner, dict))


def _mood(turn: ReconcileResult) -> tuple[bool, ...]:
    """What a condition may flip with."""
    return turn.mesh is None, turn.converged, any(p.fatal for p in turn.problems)


def _states(made: Mapping[str, Any]) -> dict[str, str]:
    return {c.get("type", ""): c.get("status", "") for c in made.get("conditions") or () if isinstance(c, dict)}


def _flipped(made: Object, before: Object) -> bool:
    return _states(made) != _states(before)


def _same(made: Object, before: Object) -> bool:
    mine = [(c["type"], c["status"], c["reason"], c["message"]) for c in made["conditions"]]
    theirs = [
        tuple(c.get(k, "") for k in ("type", "status", "reason", "message")) for c in before.get("conditions", ())
    ]
    return mine == theirs and all(made[key] == before.get(key) for key in made if key != "conditions")


def _dated(made: Object, before: Object, now: str) -> list[dict[str, str]]:
    """The conditions, each with the time since when it has its status."""
    old = {c.get("type"): c for c in before.get("conditions") or () if isinstance(c, dict)}
    dated = []
    for condition in made["conditions"]:
        was = old.get(condition["type"], {})
        since = was.get("lastTransitionTime") if was.get("status") == condition["status"] else None
        dated.append({**condition, "lastTransitionTime": str(since or now)})
    return dated
