"""Keep a copy of a collection current: list, replace, watch, with jittered back-off, until closed.

Each object is projected when it arrives, and only the projection is kept. Whatever the server does wrong (410, ERROR
events, garbage, silence, cut connections) ends in another list or watch; until that succeeds the old copy stays.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Generic, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_when_event_set, wait_random_exponential

from ovsmesh.errors import OvsmeshError
from ovsmesh.kube.client import Api, Garbage, Gone, NotFound, Object, Stream, name_of
from ovsmesh.kube.http import ApiError
from ovsmesh.wakeup import Wakeup

log = logging.getLogger("ovsmesh")

T = TypeVar("T")

SECONDS = 540
"""Seconds after which the server ends a watch, so that watches spread over the servers again."""
SILENCE = 90.0
"""Seconds without a byte after which a watch has stalled: bookmarks come every 60 to 75 s."""
_HEALTHY = 5.0
"""Seconds that a watch must have lived for the back-off to start again."""
_BACKOFF = wait_random_exponential(multiplier=0.4, max=8.0, min=0.05)
"""Uniform between 0.05 s and 0.4, 0.8, 1.6, … 8 s: three thousand agents must not come back together."""
MISSHAPEN = (KeyError, TypeError, ValueError, AttributeError, IndexError)
"""What a projection raises for an object of another shape than it expects."""


@dataclass(frozen=True, slots=True)
class Collection(Generic[T]):
    """A collection as a Reflector last saw it: never changed, replaced by another."""

    items: Mapping[str, T]
    """Name, prefixed with "namespace/" where there is one → the projection."""
    synced: bool = False
    """A whole list has arrived. Stays True: the copy may be old (see `problem`), but never partial."""
    problem: str = ""
    """Why the copy is not current; "" while a watch is open."""
    since: float = 0.0
    """When it was last current, in seconds since the epoch; 0 for never."""
    lists: int = 0
    """Number of lists so far."""

    @property
    def current(self) -> bool:
        """A whole list has arrived, and a watch is open."""
        return self.synced and self.since > 0 and not self.problem


class Reflector(Generic[T]):
    """A thread that keeps `collection()` current and calls wakeup.wake() when it changes.

    `project` takes the raw object and returns what to keep. It must compare by value: an equal projection wakes nobody.
    None leaves the object out. It runs in the thread; what it raises (KeyError, TypeError, ValueError,
    AttributeError) is logged, and the last good projection of that object stays.
    """

    def __init__(
        self,
        api: Api,
        path: str,
        project: Callable[[Object], T | None],
        wakeup: Wakeup,
        *,
        labels: str = "",
        fields: str = "",
        limit: int = 250,
        seconds: int = SECONDS,
        silence: float = SILENCE,
    ) -> None:
        self._api, self._path, self._project, self._wakeup = api, path, project, wakeup
        self._query = {**({"labelSelector": labels} if labels else {}), **({"fieldSelector": fields} if fields else {})}
        self._limit, self._seconds, self._silence = limit, seconds, silence
        self._lock = threading.Lock()
        self._items: dict[str, T] = {}
        self._collection: Collection[T] = Collection(MappingProxyType({}))
        self._stale = False
        self._version = ""
        self._stop = threading.Event()
        self._stream: Stream | None = None
        self._bytes = 0
        self.events = 0
        """Watch events so far, bookmarks included."""
        self._thread = threading.Thread(target=self._run, name=f"watch {path}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout: float = 2.0) -> None:
        """End the thread; wait for it up to `timeout` seconds."""
        self._stop.set()
        with self._lock:
            if self._stream is not None:
                self._stream.close()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def collection(self) -> Collection[T]:
        """Return the collection as it is now; the same object while nothing changes."""
        with self._lock:
            if self._stale:
                self._collection = replace(self._collection, items=MappingProxyType(dict(self._items)))
                self._stale = False
            return self._collection

    @property
    def received(self) -> int:
        """Bytes of watch events so far."""
        stream = self._stream
        return self._bytes + (stream.received if stream else 0)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._stop.is_set():
            retrying = Retrying(
                wait=_wait,
                sleep=self._sleep,
                stop=stop_when_event_set(self._stop),
                retry=retry_if_exception_type(OvsmeshError),
                reraise=True,
            )
            with contextlib.suppress(OvsmeshError):  # only when told to stop
                retrying(self._round)

    def _sleep(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _round(self) -> None:
        """List where needed, then watch until it ends. Returns after a healthy watch, else raises."""
        try:
            if not self._version:
                self._list()
            began = time.monotonic()
            self._watch()
            if time.monotonic() - began < _HEALTHY and not self._stop.is_set():
                raise ApiError(f"{self._path}: the watch ended at once")
        except (Gone, Garbage, NotFound) as error:
            # what was missed is unknown
            self._version = ""
            self._set_problem(str(error))
            raise
        except OvsmeshError as error:
            self._set_problem(str(error))
            raise

    def _list(self) -> None:
        found: dict[str, T] = {}
        version = ""
        for page in self._api.pages(self._path, self._limit, **self._query):
            version = page.version
            for item in page.items:
                self._take(found, name_of(item), item)
            if self._stop.is_set():
                return
        with self._lock:
            changed = found != self._items or not self._collection.synced
            self._items = found
            self._stale = True
            self._collection = replace(self._collection, synced=True, lists=self._collection.lists + 1)
        self._version = version
        if changed:
            self._wakeup.wake()

    def _take(self, into: dict[str, T], name: str, item: Object) -> None:
        try:
            kept = self._project(item)
        except MISSHAPEN as error:
            why = f"{type(error).__name__}: {error}"
            log.warning("%s %s: cannot be read (%s); its last good state stays", self._path, name, why)
            if name in self._items:
                into[name] = self._items[name]
            return
        if kept is None:
            into.pop(name, None)
        else:
            into[name] = kept

    def _watch(self) -> None:
        # Clients that came back together after an outage must not return together again.
        seconds = max(1, int(self._seconds * random.uniform(0.6, 1.0)))
        stream = self._api.watch(self._path, self._version, seconds, self._silence, **self._query)
        with self._lock:
            self._stream = stream
        try:
            if self._stop.is_set():
                return
            self._set_problem("")
            for kind, item in stream:
                self.events += 1
                self._event(kind, item)
        finally:
            with self._lock:
                self._bytes += stream.received
                self._stream = None
            stream.release()

    def _event(self, kind: str, item: Object) -> None:
        if kind == "ERROR":
            code, message = item.get("code"), str(item.get("message") or item)[:500]
            # whatever the error is, events may be missing
            raise Gone(f"{self._path}: the watch ended in an error: {message}", code if isinstance(code, int) else 0)
        if kind not in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK"):
            raise Garbage(f"{self._path}: unknown watch event {kind[:40]!a}")
        metadata = item.get("metadata")
        version = metadata.get("resourceVersion") if isinstance(metadata, dict) else None
        if not isinstance(version, str) or not version:
            raise Garbage(f"{self._path}: a watch event without resourceVersion")
        if kind != "BOOKMARK":
            name = name_of(item)
            with self._lock:
                before = self._items.get(name)
                if kind == "DELETED":
                    self._items.pop(name, None)
                else:
                    self._take(self._items, name, item)
                changed = self._items.get(name) != before
                self._stale = self._stale or changed
            if changed:
                self._wakeup.wake()
        self._version = version

    def _set_problem(self, problem: str) -> None:
        """Record whether the collection is current; wake the loop where that changes."""
        with self._lock:
            before = self._collection
            if before.problem == problem and problem:
                return
            current = not before.problem and before.since
            since = time.time() if not problem or current else before.since
            self._collection = replace(before, problem=problem, since=since)
        if self._stop.is_set() or before.problem == problem:
            return
        (log.warning if problem else log.info)("%s", problem or f"{self._path}: watching")
        if bool(problem) != bool(before.problem):
            self._wakeup.wake()


def _wait(state: RetryCallState) -> float:
    """Return the back-off, or the server's Retry-After where that is longer, up to half a minute."""
    error = state.outcome.exception() if state.outcome else None
    asked = min(error.retry_after, 30.0) if isinstance(error, ApiError) else 0.0
    return max(float(_BACKOFF(state)), asked)
