"""Removal of MeshNodes that nobody will write again.

The API server removes a MeshNode with the Node that owns it, some time later; where the Node exists again by then,
its agent waits for that. One without owner (made before its agent knew its Node's uid, or by a static member) would
stay.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping

from ovsmesh.controller.membership import NodeView
from ovsmesh.controller.node_conditions import AgentReport, orphans
from ovsmesh.kube.client import Api, Conflict, Forbidden, NotFound, path_of
from ovsmesh.names import MESH_NODES

log = logging.getLogger("ovsmesh")

EVERY, SOON = 60.0, 1.0
"""Seconds between two rounds, and between two where Nodes have changed."""


class GarbageCollector:
    """Call `collect` when it is due."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._last = float("-inf")
        self._nodes: Mapping[str, NodeView] = {}

    def collect(
        self, reports: Mapping[str, AgentReport], nodes: Mapping[str, NodeView], static: Iterable[str], now: float
    ) -> float:
        """Remove what is due. Return the seconds until the next round. Raises Unavailable, NotLeader."""
        due = self._last + (SOON if nodes is not self._nodes else EVERY)
        if now < due:
            return due - now
        self._last, self._nodes = now, nodes
        alive = dict.fromkeys(static, "") | {name: node.uid for name, node in nodes.items()}
        for report in orphans(reports.values(), alive, time.time()):
            try:
                self._api.delete(path_of(MESH_NODES, report.name), uid=report.uid)
            except (Conflict, NotFound):
                continue  # made again, or gone
            except Forbidden as error:
                log.warning("MeshNode %s: can't be removed: %s", report.name, error)
                break
            log.info("MeshNode %s: removed, as its Node is gone", report.name)
        return EVERY
