"""Knows which of several processes leads: one Lease object, renewed by its holder, taken over when it is not.

The holder stops counting itself as such strictly before anyone else may take over, measured on its own
monotonic clock from before the request that renewed. Imports kube and model only.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ovsmesh.errors import OvsmeshError
from ovsmesh.kube.client import AlreadyExists, Api, Conflict, NotFound, Object, path_of

log = logging.getLogger("ovsmesh")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds. `deadline` < `duration`: the holder is out before another is in; `retry` is between two tries."""

    duration: int = 15
    deadline: float = 10.0
    retry: float = 2.0


class Lease:
    """A thread that gets and keeps the Lease. `changed(True/False)` is called in it when that succeeds or ends.

    `remaining()` is for Api.fenced: 0 as soon as the lease may be another's, whether or not the thread has
    noticed. Once lost, it may be won again, unless `close` was called.
    """

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        identity: str,
        changed: Callable[[bool], None],
        times: Times | None = None,
    ) -> None:
        self._times = times or Times()
        assert self._times.retry < self._times.deadline < self._times.duration
        self._api = api
        self._collection = path_of("/apis/coordination.k8s.io/v1/namespaces", namespace, "leases")
        self._path = path_of(self._collection, name)
        self._name, self._identity, self._changed = name, identity, changed
        self._until = 0.0
        self._leads = False
        self._seen: tuple[object, ...] = ()
        self._seen_at = 0.0
        self._told = ""
        self.holder = ""
        """Who holds it as far as we know."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Gives the lease back, so that another has it within one of its tries. Writes are fenced off first."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def remaining(self) -> float:
        """Seconds for which the lease is ours for certain; 0 when it is not."""
        return max(0.0, self._until - time.monotonic())

    @property
    def leads(self) -> bool:
        return self.remaining() > 0

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._stop.is_set():
            self._try()
            self._settle()
            # While it leads: woken in time to notice the end, whatever happens to the renewals.
            pause = self._times.retry * random.uniform(0.8, 1.2)
            self._stop.wait(min(pause, self.remaining() + 0.01) if self._leads else pause)
            self._settle()
        self._give_back()

    def _settle(self) -> None:
        """Says so where we lead now and did not, or the reverse."""
        leads = self.leads
        if leads != self._leads:
            self._leads = leads
            log.info("lease %s: %s", self._name, f"held as {self._identity}" if leads else "lost")
            self._changed(leads)

    def _try(self) -> None:
        began = time.monotonic()
        # a renewal that comes back too late is of no use, so it is not waited for
        limit = max(0.5, self.remaining()) if self._leads else self._times.retry * 2
        api = self._api.within(min(limit, self._times.deadline / 2))
        try:
            self._renew(api, began)
        except Conflict:
            pass  # someone else was faster: looked at again the next time
        except OvsmeshError as error:
            if str(error) != self._told:
                self._told = str(error)
                log.warning("lease %s: %s", self._name, error)
        else:
            self._told = ""

    def _renew(self, api: Api, began: float) -> None:
        try:
            found = api.get(self._path)
        except NotFound:
            with contextlib.suppress(AlreadyExists):
                api.create(self._collection, self._object(None, began))
                self._won(began)
            return
        spec = found.get("spec") if isinstance(found.get("spec"), dict) else {}
        assert isinstance(spec, dict)
        self.holder = str(spec.get("holderIdentity") or "")
        if self.holder == self._identity:
            api.replace(self._path, self._object(found, began))
            self._won(began)
            return
        if self._leads:
            self._until = 0.0
        if self.holder and not self._expired(found, spec, began):
            return
        api.replace(self._path, self._object(found, began))
        self._won(began)

    def _expired(self, found: Object, spec: dict[str, Any], now: float) -> bool:
        """Whether the holder has not renewed for its duration, by our clock: theirs may be wrong."""
        seen = (self.holder, spec.get("renewTime"), found["metadata"].get("resourceVersion"))
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
        duration = spec.get("leaseDurationSeconds")
        wait = duration if isinstance(duration, int) and duration > 0 else self._times.duration
        return now - self._seen_at > wait

    def _won(self, began: float) -> None:
        self.holder = self._identity
        self._until = began + self._times.deadline

    def _object(self, found: Object | None, began: float) -> Object:
        """The lease in our hands; with the resourceVersion of `found`, so that it is refused where that changed."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        old: dict[str, Any] = (found or {}).get("spec") or {}
        ours = old.get("holderIdentity") == self._identity
        count = old.get("leaseTransitions")
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._times.duration,
            "acquireTime": old.get("acquireTime") if ours else now,
            "renewTime": now,
            "leaseTransitions": (count if isinstance(count, int) else 0) + (not ours and found is not None),
        }
        metadata = found["metadata"] if found else {"name": self._name}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}

    def _give_back(self) -> None:
        ours, self._until = self.leads, 0.0
        self._settle()
        if not ours:
            return
        try:
            api = self._api.within(2.0)
            found = api.get(self._path)
            if found["spec"].get("holderIdentity") == self._identity:
                del found["spec"]["holderIdentity"]  # an empty one is refused
                found["spec"]["leaseDurationSeconds"] = 1
                api.replace(self._path, found)
        except (OvsmeshError, KeyError, TypeError) as error:
            log.warning("lease %s: could not be given back, it runs out by itself: %s", self._name, error)
