"""Elect one leader of several processes by a Lease object, which its holder renews and another takes over when not.

The holder stops leading strictly before anyone else may take over, by its own monotonic clock, from before the request
that renewed.
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
class Timing:
    """Seconds. `deadline` < `duration`: the holder is out before another is in; `retry` is between two attempts."""

    duration: int = 15
    deadline: float = 10.0
    retry: float = 2.0


class LeaderElector:
    """A thread that acquires and renews the Lease. It calls `changed(True/False)` when it wins or loses it.

    `remaining()` is for Api.fenced: 0 as soon as another may hold the lease, whether or not the thread has noticed.
    A lost lease may be won again, unless `close` was called.
    """

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        identity: str,
        changed: Callable[[bool], None],
        timing: Timing | None = None,
    ) -> None:
        self._timing = timing or Timing()
        assert self._timing.retry < self._timing.deadline < self._timing.duration
        self._api = api
        self._collection = path_of("/apis/coordination.k8s.io/v1/namespaces", namespace, "leases")
        self._path = path_of(self._collection, name)
        self._name, self._identity, self._changed = name, identity, changed
        self._until = 0.0
        self._led = False
        self._seen: tuple[object, ...] = ()
        self._seen_at = 0.0
        self._logged = ""
        self.holder = ""
        """Identity of the holder, as last read."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Release the lease, so that another takes it at its next attempt. Writes are fenced off first."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def remaining(self) -> float:
        """Return the seconds for which this process surely holds the lease; 0 where it does not."""
        return max(0.0, self._until - time.monotonic())

    @property
    def is_leader(self) -> bool:
        """Whether this process surely holds the lease now."""
        return self.remaining() > 0

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._stop.is_set():
            self._attempt()
            self._announce()
            # A leader wakes in time to notice the end, whatever happens to the renewals.
            pause = self._timing.retry * random.uniform(0.8, 1.2)
            self._stop.wait(min(pause, self.remaining() + 0.01) if self._led else pause)
            self._announce()
        self._release()

    def _announce(self) -> None:
        """Call `changed` where leadership was won or lost since the last call."""
        leads = self.is_leader
        if leads != self._led:
            self._led = leads
            log.info("lease %s: %s", self._name, f"held as {self._identity}" if leads else "lost")
            self._changed(leads)

    def _attempt(self) -> None:
        began = time.monotonic()
        # a renewal that returns too late is useless, so it is not waited for
        limit = max(0.5, self.remaining()) if self._led else self._timing.retry * 2
        api = self._api.within(min(limit, self._timing.deadline / 2))
        try:
            self._renew(api, began)
        except Conflict:
            pass  # another was faster: read again at the next attempt
        except OvsmeshError as error:
            if str(error) != self._logged:
                self._logged = str(error)
                log.warning("lease %s: %s", self._name, error)
        else:
            self._logged = ""

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
        if self._led:
            self._until = 0.0
        if self.holder and not self._expired(found, spec, began):
            return
        api.replace(self._path, self._object(found, began))
        self._won(began)

    def _expired(self, found: Object, spec: dict[str, Any], now: float) -> bool:
        """Whether the holder has not renewed for its duration, by this host's clock: the holder's may be wrong."""
        seen = (self.holder, spec.get("renewTime"), found["metadata"].get("resourceVersion"))
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
        duration = spec.get("leaseDurationSeconds")
        wait = duration if isinstance(duration, int) and duration > 0 else self._timing.duration
        return now - self._seen_at > wait

    def _won(self, began: float) -> None:
        self.holder = self._identity
        self._until = began + self._timing.deadline

    def _object(self, found: Object | None, began: float) -> Object:
        """Return the Lease with this holder; refused where the resourceVersion of `found` has changed."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        old: dict[str, Any] = (found or {}).get("spec") or {}
        renewal = old.get("holderIdentity") == self._identity
        count = old.get("leaseTransitions")
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._timing.duration,
            "acquireTime": old.get("acquireTime") if renewal else now,
            "renewTime": now,
            "leaseTransitions": (count if isinstance(count, int) else 0) + (not renewal and found is not None),
        }
        metadata = found["metadata"] if found else {"name": self._name}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}

    def _release(self) -> None:
        held, self._until = self.is_leader, 0.0
        self._announce()
        if not held:
            return
        try:
            api = self._api.within(2.0)
            found = api.get(self._path)
            if found["spec"].get("holderIdentity") == self._identity:
                del found["spec"]["holderIdentity"]  # an empty one is refused
                found["spec"]["leaseDurationSeconds"] = 1
                api.replace(self._path, found)
        except (OvsmeshError, KeyError, TypeError) as error:
            log.warning("lease %s: could not be released, it expires by itself: %s", self._name, error)
