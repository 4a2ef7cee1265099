"""Write this node's MeshNode, as seldom as is useful: a thousand agents share one API server.

A thread of its own writes, so the API server never delays the loop.
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
from ovsmesh.agent.result import NodeStatus
from ovsmesh.dataplane.report import NOT_REACHED, Peer, Report
from ovsmesh.dataplane.types import State
from ovsmesh.errors import OvsmeshError
from ovsmesh.kube.client import AlreadyExists, Api, Conflict, NotFound, Object, path_of
from ovsmesh.kube.http import ApiError
from ovsmesh.names import API_VERSION, MESH_NODE, MESH_NODES
from ovsmesh.probe.quorum import CUT_OFF, LISTED, Vote, rank
from ovsmesh.reasons import Reason
from ovsmesh.text import timestamp

log = logging.getLogger("ovsmesh")

EVERY = 300.0
"""Seconds between writes when nothing changes: how old a healthy node's MeshNode may be."""
AT_LEAST = 30.0
"""Seconds between writes of changes that flip nothing, and between those of a node that cannot reach most others."""
_FLIP = 1.0
"""Seconds between writes of flips: of a condition, or of which peers are lost."""
_FLIPS, _REFILL, _REFILL_OF_PEER = 4, 5.0, 0.03
"""So many flips may follow each other; then one in 5 s, or in 0.03 s a peer where that is longer: a node that flaps
must not write at each flap, and where a host dies all of its peers write."""
CHECK = 300.0
"""Seconds until what was written is read again, as it may be deleted or edited by hand.

It is not watched: an agent may read MeshNodes by name only.
"""
_FIRST_CHECK = 10.0
"""The same for a MeshNode just made: Kubernetes may still be removing what belonged to an earlier Node."""
_BACKOFF = (0.5, 60.0)
_GONE = 4.0
"""Most seconds between two looks whether an earlier Node's MeshNode is gone."""
_CONDITIONS = ("Converged", "Degraded")


_Published = tuple[NodeStatus, dict[str, str]]
"""A status, and the slices that its mesh was made of."""


class MeshNodeWriter:
    """Writes the status of the MeshNode of `node`, and makes the MeshNode where it is absent.

    `observed` returns the resourceVersions of the slices that the status just published was made of. It is called
    in the loop's thread. `clock` returns monotonic seconds.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._node, self._observed, self._clock = api, node, observed, clock
        # a thousand agents that start together must not write together afterwards
        self._every, self._at_least, self._flip = every * random.uniform(0.8, 1.0), at_least, flip
        self._check_every, self._check_at = check * random.uniform(0.8, 1.0), float("inf")
        self._path = path_of(MESH_NODES, node)
        self._wake = threading.Condition()
        self._stopping = False
        self._published: _Published | None = None
        self._seen: _Published | None = None
        self._body: Object = {}
        """The status as it is to be written."""
        self._body_of: _Published | None = None
        self._states: object = None
        """What flips, of the body's result."""
        self._written_states: object = None
        self._flips_left, self._flips_at = float(_FLIPS), clock()
        """Flips that could be written after the last write, and when that was (monotonic)."""
        self._written: Object = {}
        self._written_at = float("-inf")
        self._exists = False
        """Whether the MeshNode is known to be there and to belong to the Node."""
        self._new = False
        self._uid = ""
        """Of this node's Node, as the mesh has it."""
        self._error = ""
        self._backoff = 0.0
        self.writes = 0
        """Writes that were accepted."""
        self._thread: threading.Thread | None = None

    def start(self) -> MeshNodeWriter:
        """Write from now on, in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="meshnode", daemon=True)
        self._thread.start()
        return self

    def publish(self, status: NodeStatus) -> None:
        """Have this status written when it is due."""
        # an agent that still waits for the API server has nothing to say of its node
        if status.result.mesh is None and any(p.reason == Reason.MeshWaiting for p in status.result.problems):
            return
        with self._wake:
            self._published = status, dict(self._observed())
            self._wake.notify()

    def idle(self) -> None:
        """Do nothing: a thread of its own writes."""
        return

    def close(self, timeout: float = 2.0) -> None:
        """End the thread, within `timeout` seconds."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(timeout)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        pause: float | None = None
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._published is not self._seen, pause)
                if self._stopping:
                    return
            pause = self.step()

    def step(self) -> float | None:
        """Do what is due now. Return the seconds until something may be due without a new status, None for never."""
        self._seen = self._published
        if self._seen is not None:
            self._write_if_due(self._seen)
        if self._clock() >= self._check_at:
            self._check()
        times = [self._check_at] if self._check_at != float("inf") else []
        times += [self._due()] if self._body else []
        if self._seen is not self._body_of:
            times.append(self._routine())
        return max(0.0, min(times) - self._clock()) if times else None

    def _write_if_due(self, now: _Published) -> None:
        result = now[0].result
        me = result.mesh.node(self._node) if result.mesh else None
        if me is not None and me.uid != self._uid:
            # a Node made again under this name: the MeshNode of the earlier one goes with it
            self._uid, self._exists, self._written, self._states = me.uid, False, {}, None
        # the report takes long, so it is asked for only where a write may be due
        if now is not self._body_of and (_states_of(now[0]) != self._states or self._clock() >= self._routine()):
            self._make(now)
        if self._body and self._clock() >= self._due():
            if now is not self._body_of:
                self._make(now)
            if self._clock() >= self._due():
                self._write()

    def _make(self, now: _Published) -> None:
        self._body, self._body_of, self._states = _body(now), now, _states_of(now[0])

    def _routine(self) -> float:
        """Return when a change that flips nothing may be written (monotonic seconds)."""
        return self._written_at + max(self._at_least, self._backoff)

    def _due(self) -> float:
        """Return when the body is to be written (monotonic seconds)."""
        if not self._written:
            after = 0.0
        elif self._flipped():
            after = max(self._flip, (1.0 - self._flips_left) * self._refill())
        elif _lonely(self._body):
            after = self._at_least
        else:
            after = self._every if _same(self._body, self._written) else self._at_least
        return self._written_at + max(after, self._backoff)

    def _flipped(self) -> bool:
        if _condition_states(self._body) != _condition_states(self._written):
            return True
        return self._states != self._written_states is not None

    def _refill(self) -> float:
        """Return the seconds after which one more flip may be written."""
        return max(_REFILL, _REFILL_OF_PEER * int(self._body["peers"]["wanted"]))

    def _count_flip(self, flipped: bool) -> None:
        now = self._clock()
        filled = self._flips_left + (now - self._flips_at) / self._refill()
        self._flips_left, self._flips_at = min(float(_FLIPS), filled) - flipped, now

    def _write(self) -> None:
        try:
            if not self._exists:
                self._get_or_create()
            now = timestamp(time.time())
            body = {**self._body, "observedAt": now, "conditions": _dated(self._body, self._written, now)}
            sent = dict(body)
            for key in ("observedSlices", "reachability"):
                gone = dict.fromkeys((self._written.get(key) or {}).keys() - body[key].keys())
                sent[key] = {**body[key], **gone}
            flipped = bool(self._written) and self._flipped()
            self._api.patch(path_of(self._path, "status"), {"status": sent})
        except NotFound as error:
            # deleted by hand, or with an earlier Node: make it again at once, and later if that does not help
            self._failed(error, 0.0 if self._exists else _BACKOFF[0])
            self._exists, self._written = False, {}
        except Conflict as error:
            # Kubernetes' garbage collector removes it soon
            self._failed(error, _BACKOFF[0], _GONE)
        except OvsmeshError as error:
            self._failed(error, _BACKOFF[0])
        else:
            self.writes += 1
            self._written, self._written_at, self._backoff = body, self._clock(), 0.0
            self._count_flip(flipped)
            self._written_states = self._states
            check = min(_FIRST_CHECK, self._check_every) if self._new else self._check_every
            self._check_at, self._new = self._written_at + check, False
            if self._error:
                log.info("MeshNode %s is written again", self._node)
            self._error = ""

    def _failed(self, error: OvsmeshError, least: float, most: float = _BACKOFF[1]) -> None:
        asked = error.retry_after if isinstance(error, ApiError) else 0.0
        self._backoff = max(asked, min(most, max(least, self._backoff * 2)) * random.uniform(0.5, 1.0))
        self._written_at = self._clock()
        if str(error) != self._error:
            self._error = str(error)
            log.warning("MeshNode %s could not be written: %s", self._node, error)

    def _check(self) -> None:
        """Write it again, at once, if it is gone or differs from what was written."""
        self._check_at = self._clock() + self._check_every
        try:
            found = self._api.get(self._path).get("status")
        except NotFound:
            log.warning("MeshNode %s was deleted by someone; making it again", self._node)
            self._exists, self._written = False, {}
        except OvsmeshError:
            return  # if this lasts, the next write logs it
        else:
            there: Object = found if isinstance(found, dict) else {}
            if all(there.get(key) == value for key, value in self._written.items()):
                return
            log.warning("MeshNode %s was edited by someone; writing it again", self._node)
            self._written = there
        self._written_at = float("-inf")

    def _get_or_create(self) -> None:
        """Read what an earlier run wrote, as the conditions' times go on from there, or create the MeshNode."""
        try:
            found = self._api.get(self._path)
        except NotFound:
            metadata: dict[str, Any] = {"name": self._node}
            if self._uid:
                # Kubernetes removes the MeshNode with its Node
                owner = {"apiVersion": "v1", "kind": "Node", "name": self._node, "uid": self._uid}
                metadata["ownerReferences"] = [owner]
            made = {"apiVersion": API_VERSION, "kind": MESH_NODE, "metadata": metadata, "spec": {}}
            try:
                found = self._api.create(MESH_NODES, made)
                self._new = True
            except AlreadyExists:
                found = self._api.get(self._path)
        if _is_of_another(found, self._uid):
            message = f"{self._path} belongs to an earlier Node of this name; it is made again once it is gone"
            raise Conflict(f"{message} (Kubernetes removes it; or run `kubectl delete meshnode {self._node}`)")
        before = found.get("status")
        self._written = before if isinstance(before, dict) else {}
        self._exists = True


def _body(published: _Published) -> Object:
    """Return the status of the MeshNode, without times."""
    status, slices = published
    result, report = status.result, status.report
    conditions = [
        {"type": c.type, "status": c.status, "reason": c.reason, "message": c.message[:1000]}
        for c in report.conditions
        if c.type in _CONDITIONS
    ]
    refused = report.count("refused")
    if refused:
        conditions[-1]["message"] = f"{conditions[-1]['message']}; {refused} peers refused"
    ports = result.have.dataplane.ports if result.have is not None else {}
    have = {port.node for port in ports.values()}
    installed = sum(peer.name in have for peer in report.peers if peer.state not in ("refused", "held"))
    return {
        "observedSlices": slices,
        "peers": {"wanted": report.count("wanted"), "installed": installed, "up": report.count("ok")},
        "reachability": _reachability(report),
        "mtu": report.self.mtu,
        "versions": {"agent": __version__, "ovs": report.self.ovs_version, "kernel": platform.release()[:128]},
        "conditions": conditions,
    }


_WORST = (
    State.UNREACHABLE, State.NOT_FORWARDED, State.SMALL, State.LOSSY, "missing", "unknown", "refused",
)  # fmt: skip
"""States of the peers that are named, the worst first."""


def _reachability(report: Report) -> Object:
    """Return what the probes found."""
    wanted = [peer for peer in report.peers if peer.state not in ("held", "refused")]
    probed = [peer for peer in wanted if peer.reach is not None and peer.reach.state is not State.UNPROBED]
    cut_off = [peer for peer in probed if peer.state in CUT_OFF]
    reached = [peer.reach for peer in probed if peer.reach is not None and peer.reach.state not in CUT_OFF]
    trips = [reach.round_trip for reach in reached if reach.round_trip is not None]
    bad = [peer for peer in report.peers if peer.state in _WORST]
    bad.sort(key=lambda peer: (_WORST.index(peer.state), rank(report.self.name, peer.name)))
    found: Object = {
        "reachable": f"{report.count('ok')}/{len(wanted)}",
        "unreachable": len(cut_off),
        "unprobed": len(wanted) - len(probed),
        "worstPeers": [_worst(peer) for peer in sorted(bad[:LISTED], key=lambda peer: peer.name)],
    }
    if trips:
        found["worstRoundTrip"] = _milliseconds(max(trips))
    if reached:
        found["pathMTU"] = min(reach.path_mtu or report.self.mtu for reach in reached)
    return found


def _worst(peer: Peer) -> Object:
    found: Object = {"name": peer.name, "state": str(peer.state)}
    if peer.reach is not None and peer.state == peer.reach.state:
        found["since"] = timestamp(peer.reach.since)
    if peer.missing:
        found["cause"] = peer.missing[0][:256]
    return found


def _lonely(body: Object) -> bool:
    """Return whether the node cannot reach most others. Its agent goes on to say so, as nobody else may."""
    found, wanted = body["reachability"], body["peers"]["wanted"]
    return Vote(wanted, wanted - found["unprobed"], found["unreachable"], frozenset()).lonely


def _milliseconds(seconds: float) -> str:
    found = seconds * 1000
    return f"{found:.0f} ms" if found >= 10 else f"{found:.1f} ms" if found >= 1 else f"{found:.2f} ms"


def _is_of_another(found: Object, uid: str) -> bool:
    """Return whether all owners are other objects than the Node with this uid: then it is about to be removed."""
    owners = found.get("metadata", {}).get("ownerReferences") or ()
    return bool(uid and owners) and all(owner.get("uid") != uid for owner in owners if isinstance(owner, dict))


def _states_of(status: NodeStatus) -> tuple[object, ...]:
    """Return what a flip is a change of: what decides the conditions' states, and which peers are lost."""
    result, states = status.result, status.states
    lost = frozenset((name, state) for name, state in states.items() if state in NOT_REACHED)
    probed = 2 * sum(state is not State.UNPROBED for state in states.values()) > len(states)
    return result.mesh is None, result.converged, any(p.fatal for p in result.problems), probed, lost


def _condition_states(body: Mapping[str, Any]) -> dict[str, str]:
    return {c.get("type", ""): c.get("status", "") for c in body.get("conditions") or () if isinstance(c, dict)}


def _same(body: Object, before: Object) -> bool:
    """Return whether two statuses differ in nothing but times, round trips and rates of loss, which always change."""
    keys = ("type", "status", "reason", "message")
    new = [tuple(c[key] for key in keys) for c in body["conditions"]]
    old = [tuple(c.get(key, "") for key in keys) for c in before.get("conditions", ())]
    if new != old or _steady(body["reachability"]) != _steady(before.get("reachability")):
        return False
    return all(body[key] == before.get(key) for key in body if key not in ("conditions", "reachability"))


def _steady(found: object) -> Object:
    """Return the part of `reachability` whose changes are worth a write."""
    if not isinstance(found, dict):
        return {}
    worst = [(peer.get("name"), peer.get("state")) for peer in found.get("worstPeers") or () if isinstance(peer, dict)]
    return {**found, "worstRoundTrip": None, "worstPeers": worst}


def _dated(body: Object, before: Object, now: str) -> list[dict[str, str]]:
    """Return the conditions, each with the time since when it has its status."""
    old = {c.get("type"): c for c in before.get("conditions") or () if isinstance(c, dict)}
    dated = []
    for condition in body["conditions"]:
        was = old.get(condition["type"], {})
        since = was.get("lastTransitionTime") if was.get("status") == condition["status"] else None
        dated.append({**condition, "lastTransitionTime": str(since or now)})
    return dated
