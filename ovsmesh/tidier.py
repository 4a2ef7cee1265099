"""Removes MeshNodes that nobody will write again. Those of a Node that is gone go with it, by their owner; one
without owner (made before its agent knew its Node's uid, or by a static member's) would stay for ever.

Imports kube and reports.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping

from ovsmesh.kube import GROUP, Api, Conflict, Forbidden, NotFound, path_of
from ovsmesh.reports import Report, orphans

log = logging.getLogger("ovsmesh")

MESHNODES = f"{GROUP}/meshnodes"
EVERY = 60.0
"""Seconds between two looks."""


class Tidier:
    """`turn` when it asks for it."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._next = 0.0
        self.removed = 0

    def turn(self, reports: Mapping[str, Report], alive: Collection[str], now: float) -> float:
        """Removes what is due; seconds until it wants to be called again. `alive` are the names of all Nodes and
        members. Raises Unavailable, NotLeader."""
        if now < self._next:
            return self._next - now
        self._next = now + EVERY
        for report in orphans(reports.values(), alive, time.time()):
            try:
                self._api.delete(path_of(MESHNODES, report.name), uid=report.uid)
            except (Conflict, NotFound):
                continue  # made again, or gone
            except Forbidden as error:
                log.warning("MeshNode %s: can't be removed: %s", report.name, error)
                break
            self.removed += 1
            log.info("MeshNode %s: removed, as there is no such Node and its agent is silent", report.name)
        return EVERY
