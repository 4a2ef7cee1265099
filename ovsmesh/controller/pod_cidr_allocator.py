"""Pod CIDRs for Nodes that have none, so that no two Nodes get overlapping ones, whichever controller led before.

Ranges are reserved on the Lease before they are written to Nodes, in one write that only its holder can make (it
carries the resourceVersion at which it was held). The next leader reads them there, so it knows which writes of an
earlier one may still arrive. A Node's podCIDRs can't be changed once they are set, and the write names the Node's uid.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping

from ovsmesh.controller.ipam import allocate, lengths, network
from ovsmesh.controller.membership import NODES, NodeView
from ovsmesh.errors import Problem
from ovsmesh.kube.client import Api, Conflict, Invalid, NotFound, NotLeader, path_of
from ovsmesh.mesh.types import IPNetwork
from ovsmesh.names import GROUP
from ovsmesh.reasons import Reason

log = logging.getLogger("ovsmesh")

LEDGER = f"{GROUP}/allocating"
"""Annotation on the Lease: {uid of a Node: its pod CIDRs}, for those that may not have them yet."""
_BATCH = 50
"""Nodes that get theirs in one go, so that slices do not wait."""
_AGAIN = 5.0
"""Seconds until a write that has not shown on its Node is made again."""
_TRIES = 5
"""Attempts to write the Lease, which the elector renews at the same time."""


class PodCidrAllocator:
    """For the leader. `lease` is the path of its Lease, `identity` its name as holder."""

    def __init__(self, api: Api, lease: str, identity: str) -> None:
        self._api, self._lease, self._identity = api, lease, identity
        self._reserved: dict[str, tuple[str, ...]] = {}
        self._sent: dict[str, float] = {}

    def begin(self) -> None:
        """Take over what earlier leaders had reserved. Raises ApiError, NotLeader."""
        self._reserved = self._ledger()[0]
        self._sent = {}

    def allocate(
        self,
        nodes: Mapping[str, NodeView],
        clusters: tuple[IPNetwork, ...],
        asked: int | None,
        others: Iterable[IPNetwork],
        now: float,
    ) -> tuple[dict[str, Problem], bool]:
        """Give the next Nodes theirs. Return a Problem for each that can't get any, and whether more are waiting.

        `nodes` are all Nodes, `others` what is taken besides. Raises ApiError, NotLeader.
        """
        alive = {node.uid: node for node in nodes.values()}
        for uid in [uid for uid in self._reserved if uid not in alive or alive[uid].pod_cidrs]:
            del self._reserved[uid]
            self._sent.pop(uid, None)
        needs = [node for node in nodes.values() if not node.pod_cidrs and not node.excluded]
        needs.sort(key=lambda node: (node.created, node.uid))
        problems: dict[str, Problem] = {}
        try:
            length = lengths(clusters, asked)
        except ValueError as error:
            for node in needs:
                problems[node.name] = Problem(Reason.PodCIDRMissing, f"has no podCIDRs, and {error}", node.name)
            return problems, False
        new = [node for node in needs if node.uid not in self._reserved][:_BATCH]
        if new:
            texts = [*(node.pod_cidrs for node in nodes.values()), *self._reserved.values()]
            taken = [net for cidrs in texts for text in cidrs if (net := network(text))]
            found = allocate(clusters, length, [*taken, *others], [node.uid for node in new])
            if found:
                self._reserve({**self._reserved, **found})
            sizes, ranges = ", ".join(f"/{bits}" for bits in length.values()), ", ".join(map(str, clusters))
            message = f"has no podCIDRs, and no {sizes} is free in clusterCIDRs ({ranges})"
            for node in new:
                if node.uid not in found:
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
            self._api.patch(path_of(NODES, node.name), {"metadata": {"uid": node.uid}, "spec": spec})
        except (Conflict, Invalid, NotFound) as error:
            # It is gone, was made again, or got others from someone else: the watch brings it.
            log.info("node %s: podCIDRs %s not given: %s", node.name, ", ".join(cidrs), error)
        else:
            log.info("node %s: given podCIDRs %s", node.name, ", ".join(cidrs))

    # ------------------------------------------------------------ the annotation on the Lease

    def _ledger(self) -> tuple[dict[str, tuple[str, ...]], str]:
        """Return what is reserved, and the resourceVersion of the Lease. Raises NotLeader if another holds it."""
        found = self._api.get(self._lease)
        if (found.get("spec") or {}).get("holderIdentity") != self._identity:
            raise NotLeader("the lease is another's, so no pod CIDR is given")
        meta = found["metadata"]
        try:
            told = json.loads((meta.get("annotations") or {}).get(LEDGER) or "{}")
            return {str(uid): tuple(map(str, cidrs)) for uid, cidrs in told.items()}, meta["resourceVersion"]
        except (ValueError, TypeError, AttributeError):
            log.warning("lease: annotation %s can't be read and is started again", LEDGER)
            return {}, meta["resourceVersion"]

    def _reserve(self, wanted: dict[str, tuple[str, ...]]) -> None:
        """Write the annotation. Raises Conflict if the Lease changes at each attempt, NotLeader."""
        for left in reversed(range(_TRIES)):
            _, version = self._ledger()
            text = json.dumps(wanted, separators=(",", ":"))
            try:
                self._api.patch(self._lease, {"metadata": {"resourceVersion": version, "annotations": {LEDGER: text}}})
            except Conflict:
                # Most likely the elector renewed it.
                if not left:
                    raise
                time.sleep(0.01)
            else:
                self._reserved = wanted
                return
