"""Record Events for a cluster's users: repeats are counted, floods are cut off.

Best effort; never delays the caller.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime

from ovsmesh.errors import OvsmeshError
from ovsmesh.kube.client import MERGE, Api, NotFound, Object, path_of

log = logging.getLogger("ovsmesh")

REPEAT = 60.0
"""Seconds in which repeats of one Event are counted together and written once."""
_BURST, _REFILL = 25.0, 1 / 30
"""Events about one object: this many at once, then this many a second."""
_KNOWN = 4096
_QUEUE = 1024


@dataclass(frozen=True, slots=True)
class ObjectReference:
    """The object that an Event is about. `uid` makes `kubectl describe` show it."""

    api_version: str
    kind: str
    name: str
    uid: str = ""
    namespace: str = ""


@dataclass
class _Known:
    name: str
    first: str
    count: int = 1
    written: int = 0
    written_at: float = 0.0
    exists: bool = False


class EventRecorder:
    """A thread that writes Events. `component` is who reports, `instance` is which of its processes."""

    def __init__(self, api: Api, component: str, instance: str, repeat: float = REPEAT) -> None:
        self._api, self._component, self._instance, self._repeat = api, component, instance, repeat
        self._queue: queue.Queue[tuple[ObjectReference, str, str, str] | None] = queue.Queue(_QUEUE)
        self._known: OrderedDict[tuple[ObjectReference, str, str], _Known] = OrderedDict()
        self._budget: OrderedDict[ObjectReference, tuple[float, float]] = OrderedDict()
        self.dropped = 0
        """Number of Events dropped because there were too many."""
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def record(self, about: ObjectReference, reason: str, message: str, warning: bool = True) -> None:
        """Record `reason` (CamelCase) about an object; repeats within a minute are counted. Never blocks."""
        try:
            self._queue.put_nowait((about, reason, message[:1000], "Warning" if warning else "Normal"))
        except queue.Full:
            self.dropped += 1

    def close(self, timeout: float = 2.0) -> None:
        """Write what is queued, for `timeout` seconds at most."""
        end = time.monotonic() + timeout
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=timeout)
            except queue.Full:
                return
            self._thread.join(max(0.0, end - time.monotonic()))

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            try:
                queued = self._queue.get(timeout=self._repeat / 4)
            except queue.Empty:
                self._flush(False)
                continue
            if queued is None:
                self._flush(True)
                return
            self._handle(*queued)

    def _handle(self, about: ObjectReference, reason: str, message: str, kind: str) -> None:
        key = (about, reason, message)
        now = time.monotonic()
        known = self._known.get(key)
        if known is None:
            if not self._allowed(about, now):
                self.dropped += 1
                return
            # a name unique to the process and the first occurrence, valid however long the object's name is
            seed = f"{self._instance} {time.time_ns()} {key}"
            mark = hashlib.sha256(seed.encode()).hexdigest()[:16]
            name = about.name.lower()[:200].rstrip(".-") or "event"
            known = self._known[key] = _Known(f"{name}.{mark}", _stamp())
            while len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        else:
            known.count += 1
            self._known.move_to_end(key)
            if now - known.written_at < self._repeat:
                return
        self._write(key, known, kind)

    def _allowed(self, about: ObjectReference, now: float) -> bool:
        left, at = self._budget.pop(about, (_BURST, now))
        left = min(_BURST, left + (now - at) * _REFILL)
        self._budget[about] = (left - 1 if left >= 1 else left, now)
        while len(self._budget) > _KNOWN:
            self._budget.popitem(last=False)
        return left >= 1

    def _flush(self, last: bool) -> None:
        now = time.monotonic()
        for key, known in list(self._known.items()):
            if known.exists and known.written < known.count and (last or now - known.written_at >= self._repeat):
                self._write(key, known, "")

    def _write(self, key: tuple[ObjectReference, str, str], known: _Known, kind: str) -> None:
        about, reason, message = key
        known.written_at = time.monotonic()
        collection = path_of("/api/v1/namespaces", about.namespace or "default", "events")
        try:
            if known.exists:
                body = {"count": known.count, "lastTimestamp": _stamp()}
                try:
                    self._api.patch(path_of(collection, known.name), body, MERGE)
                except NotFound:  # events live for an hour
                    known.exists, known.count, known.first = False, 1, _stamp()
                    self._write(key, known, kind or "Warning")
                    return
            else:
                self._api.create(collection, self._object(about, reason, message, kind, known))
                known.exists = True
            known.written = known.count
        except OvsmeshError as error:
            log.warning("event %s about %s %s could not be recorded: %s", reason, about.kind, about.name, error)

    def _object(self, about: ObjectReference, reason: str, message: str, kind: str, known: _Known) -> Object:
        involved = {"apiVersion": about.api_version, "kind": about.kind, "name": about.name, "uid": about.uid}
        if about.namespace:
            involved["namespace"] = about.namespace
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": known.name, "namespace": about.namespace or "default"},
            "involvedObject": {key: value for key, value in involved.items() if value},
            "reason": reason,
            "message": message,
            "type": kind,
            "count": known.count,
            "firstTimestamp": known.first,
            "lastTimestamp": _stamp(),
            "source": {"component": self._component, "host": self._instance},
            "reportingComponent": self._component,
            "reportingInstance": self._instance,
        }


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
