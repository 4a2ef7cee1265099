"""Gives Nodes their pod CIDRs, so that two never get overlapping ones, whoever led before.

What is about to be given stands on the Lease first, in one write that only its holder can make (it carries the
resourceVersion at which we held it). The next leader reads it there: what an earlier one has in flight is
known. A Node's podCIDRs can't be changed once they are set, and the write names the Node's uid.
Imports allocate, kube, model and membership.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from ipaddress import ip_network

from ovsmesh.controller.ipam import allocate, lengths
from ovsmesh.controller.membership import NodeView
from ovsmesh.errors import Problem
from ovsmesh.kube.client import Api, Conflict, Invalid, NotFound, NotLeader, path_of
from ovsmesh.mesh.types import IPNetwork
from ovsmesh.reasons import Reason

log = logging.getLogger("ovsmesh")

LEDGER = "ovsmesh.io/allocating"
"""Annotation on the Lease: {uid of a Node: its pod CIDRs}, for those that may not have them yet."""
_BATCH = 50
"""Nodes given theirs in one go, so that slices are not kept waiting."""
_AGAIN = 5.0
"""Seconds until a write that has not shown on its Node is made again."""
_TRIES = 5


class Allocator:
    """For the leader. `lease` is the path of its Lease, `identity` the holder's name that is ours."""

    def __init__(self, api: Api, lease: str, identity: str) -> None:
        self._api, self._lease, self._identity = api, lease, identity
        self._reserved: dict[str, tuple[str, ...]] = {}
        self._sent: dict[str, float] = {}

    def begin(self) -> None:
        """Takes over: what earlier leaders had reserved counts. Raises ApiError, NotLeader."""
        self._reserved = self._ledger()[0]
        self._sent = {}

    def turn(
        self,
        nodes: Mapping[str, NodeView],
        clusters: tuple[IPNetwork, ...],
        asked: int | None,
        others: Iterable[IPNetwork],
        now: float,
    ) -> tuple[dict[str, Problem], bool]:
        """Gives the next Nodes theirs; a Problem for each that can't have any, and whether more are waiting.

        `nodes` are all Nodes as a reflector has them, `others` what is taken besides. Raises ApiError, NotLeader.
        """
        alive = {node.uid: node for node in nodes.values()}
        for uid in [uid for uid in self._reserved if uid not in alive or alive[uid].pod_cidrs]:
            del self._reserved[uid]
            self._sent.pop(uid, None)
        needs = [node for node in nodes.values() if not node.pod_cidrs and not node.excluded]
        if not needs:
            return {}, False
        needs.sort(key=lambda node: (node.created, node.uid))
        try:
            length = lengths(clusters, asked)
        except ValueError as error:
            return {
                n.name: Problem(Reason.PodCIDRMissing, f"has no podCIDRs, and {error}", n.name) for n in needs
            }, False
        new = [node for node in needs if node.uid not in self._reserved][:_BATCH]
        problems: dict[str, Problem] = {}
        if new:
            texts = [node.pod_cidrs for node in nodes.values()]
            taken = [*_networks([*texts, *self._reserved.values()]), *others]
            found = allocate(clusters, length, taken, [node.uid for node in new])
            if found:
                self._reserve({**self._reserved, **found})
            shown = ", ".join(f"/{bits}" for bits in length.values())
            for node in new:
                if node.uid not in found:
                    message = (
                        f"has no podCIDRs, and no {shown} is free in clusterCIDRs ({', '.join(map(str, clusters))})"
                    )
                    problems[node.name] = Problem(Reason.PodCIDRsExhausted, message, node.name)
        waiting = [node for node in needs if node.uid in self._reserved and now >= self._sent.get(node.uid, 0) + _AGAIN]
        for node in waiting[:_BATCH]:
            self._give(node, now)
        return problems, len(waiting) > _BATCH or (not problems and len(new) == _BATCH)

    def _give(self, node: NodeView, now: float) -> None:
        cidrs = self._reserved[node.uid]
        self._sent[node.uid] = now
        spec = {"podCIDR": cidrs[0], "podCIDRs": list(cidrs)}
        try:
            self._api.patch(path_of("/api/v1/nodes", node.name), {"metadata": {"uid": node.uid}, "spec": spec})
        except (Conflict, Invalid, NotFound) as error:
            # gone, made again, or given others by someone else: the reflector tells
            log.info("node %s: podCIDRs %s not given: %s", node.name, ", ".join(cidrs), error)
        else:
            log.info("node %s: given podCIDRs %s", node.name, ", ".join(cidrs))

    # ------------------------------------------------------------ the ledger

    def _ledger(self) -> tuple[dict[str, tuple[str, ...]], str]:
        """What is reserved, and the resourceVersion of the Lease that we hold. Raises NotLeader."""
        found = self._api.get(self._lease)
        if (found.get("spec") or {}).get("holderIdentity") != self._identity:
            raise NotLeader("the lease is another's, so no pod CIDR is given")
        meta = found["metadata"]
        try:
            told = json.loads((meta.get("annotations") or {}).get(LEDGER) or "{}")
            return {str(uid): tuple(map(str, cidrs)) for uid, cidrs in told.items()}, meta["resourceVersion"]
        except (ValueError, TypeError, AttributeError):
            log.warning("lease: annotation %s can't be read and is begun anew", LEDGER)
            return {}, meta["resourceVersion"]

    def _reserve(self, wanted: dict[str, tuple[str, ...]]) -> None:
        """Raises Conflict where the Lease changes under our hands again and again, NotLeader."""
        for left in reversed(range(_TRIES)):
            _, version = self._ledger()
            text = json.dumps(wanted, separators=(",", ":"))
            try:
                self._api.patch(self._lease, {"metadata": {"resourceVersion": version, "annotations": {LEDGER: text}}})
            except Conflict:
                # our own renewal, most likely
                if not left:
                    raise
                time.sleep(0.01)
            else:
                self._reserved = wanted
                return


def _networks(texts: Iterable[tuple[str, ...]]) -> list[IPNetwork]:
    found: list[IPNetwork] = []
    for cidrs in texts:
        for text in cidrs:
            try:
                found.append(ip_network(text, strict=False))
            except ValueError:
                continue  # no range, so nothing is taken by it
    return found
