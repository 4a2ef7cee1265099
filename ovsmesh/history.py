"""The history of a node: what changed, drifted, broke and recovered, in a bounded file of the state directory.

One JSON object a line, at most 1 MiB in two files, of which the older is dropped. A thread writes: no reconcile waits
for a disk. What is read back is hostile: a line that is torn, too long or of another shape is skipped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from ovsmesh.errors import OvsmeshError
from ovsmesh.state_dir import HISTORY_FILES
from ovsmesh.text import duration, printable, seconds

log = logging.getLogger("ovsmesh")

_MOST = 512 << 10
"""Bytes of each of the two files."""
_LINE = 128 << 10
"""Bytes of the parts of one entry: those of a thousand peers, but for some flows."""
_TEXT = 4096
"""Characters of one text."""
_SAME, _WINDOW = 5, 60.0
"""How often the same is told within so many seconds; how often it happened more is told at their end."""
_ONCE = frozenset({"start", "stop", "held", "confirmed"})
"""Events that are told each time."""
RECENT = 200
"""Entries that are kept in memory."""
_PENDING = 1 << 20
"""Bytes that wait for a disk that is slow or full: as many as the files hold."""
_AGAIN, _SYNC, _LAST = 10.0, 1.0, 2.0
"""Seconds between attempts to write, between two syncs, and for the last write when the agent stops."""


class Event(StrEnum):
    """What an entry is about."""

    START = "start"
    STOP = "stop"
    CHANGE = "change"
    DRIFT = "drift"
    FAILED = "failed"
    PROBLEM = "problem"
    RESOLVED = "resolved"
    LOST = "lost"
    REACHABLE = "reachable"
    HELD = "held"
    CONFIRMED = "confirmed"
    DEGRADED = "degraded"
    IN_SYNC = "in-sync"


_WARNINGS = frozenset({Event.DRIFT, Event.FAILED, Event.PROBLEM, Event.LOST, Event.HELD, Event.DEGRADED})


class Entry(NamedTuple):
    """One line of the history."""

    time: float
    """Seconds since the epoch."""
    event: str
    what: str
    who: str = ""
    """Who did it, as far as that is known."""
    took: float | None = None
    """Seconds until it was repaired or done, or for which it lasted; None while that is not known."""
    parts: tuple[str, ...] = ()
    """All that `what` names only the first of; () where it names all."""

    @property
    def text(self) -> str:
        """The entry in words, without its time."""
        took = "" if self.took is None else duration(self.took)
        if self.event == Event.DRIFT:
            process = f" ({self.who})" if self.who and self.who not in self.what else ""
            return f"{self.what}{process}; {f'restored after {took}' if took else 'not restored yet'}"
        if self.event == Event.RESOLVED:
            return f"resolved{took and f' after {took}'}: {self.what}"
        if self.event == Event.REACHABLE:
            return f"{self.what}{took and f' after {took}'}"
        if self.event == Event.IN_SYNC:
            return f"{self.what}{took and f'; degraded before for {took}'}"
        about = ", ".join(filter(None, (self.who, took)))
        return f"{self.what}{about and f' ({about})'}"

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON has it: the time as RFC 3339 in UTC, null for what is not known."""
        plain = {
            "time": datetime.fromtimestamp(self.time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "event": str(self.event),
            "what": self.what,
            "who": self.who or None,
            "took": None if self.took is None else round(self.took, 6),
        }
        return plain | {"parts": list(self.parts)} if self.parts else plain


@dataclass
class _Repeated:
    """How often the same was told within one window, which begins with the first time (monotonic seconds)."""

    began: float
    count: int = 0
    last: Entry | None = None
    level: int = 0


class History:
    """Logs and keeps what happens. `add` may be called from any thread, and waits for nothing."""

    def __init__(self, folder: str | os.PathLike[str] = "") -> None:
        """Write into this state directory; "" keeps the last entries in memory only."""
        self._folder = Path(folder) if folder else None
        self._recent: deque[Entry] = deque(maxlen=RECENT)
        self._pending: deque[bytes] = deque()
        self._waiting = 0
        """Bytes of what is pending."""
        self._wake = threading.Condition()
        self._stopping = self._failing = False
        self._same: dict[tuple[str, str], _Repeated] = {}
        self._window_end = math.inf
        """When the first of them has to be looked at (monotonic)."""
        self._thread: threading.Thread | None = None
        if self._folder:
            # a file that can't be read is a problem of whoever reads it; writing says what is wrong
            with contextlib.suppress(OvsmeshError):
                self._recent.extend(entry._replace(parts=()) for entry in read(self._folder, most=RECENT))
            self._thread = threading.Thread(target=self._run, name="history", daemon=True)
            self._thread.start()

    def add(
        self, event: str, what: str, who: str = "", took: float | None = None, parts: Iterable[str] = (), level: int = 0
    ) -> None:
        """Log and keep an entry of now. `level` of the log: that of the event where it is not given."""
        entry = Entry(time.time(), event, _line(what), _line(who), took, _bounded(parts))
        level = level or (logging.WARNING if event in _WARNINGS else logging.INFO)
        with self._wake:
            self._summarize()
            # the time that it took to be in sync is part of its words
            same = self._same.setdefault((event, "" if event == Event.IN_SYNC else what), _Repeated(time.monotonic()))
            self._window_end = min(self._window_end, same.began + _WINDOW)
            same.count, same.last, same.level = same.count + 1, entry, level
            if same.count <= _SAME or event in _ONCE:
                self._keep(entry, level)

    def _summarize(self) -> None:
        """Tell how often more something happened whose window is over. Called with the lock."""
        now = time.monotonic()
        if now < self._window_end and not self._stopping:
            return
        for key, same in list(self._same.items()):
            if now >= same.began + _WINDOW or self._stopping:
                del self._same[key]
                if same.count > _SAME and same.last and same.last.event not in _ONCE:
                    more = f"{same.last.what}; {same.count - _SAME} times more within {duration(now - same.began)}"
                    self._keep(same.last._replace(what=more), same.level)
        self._window_end = min((same.began for same in self._same.values()), default=math.inf) + _WINDOW

    def _keep(self, entry: Entry, level: int) -> None:
        """Log an entry, and have it written. Called with the lock."""
        more = f" (`ovsmesh history` has all {len(entry.parts)})" if entry.parts else ""
        log.log(level, "%s%s", entry.text, more, extra={"entry": entry})
        data = json.dumps(entry.to_dict(), ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
        self._recent.append(entry._replace(parts=()))
        if self._thread:
            self._pending.append(data + b"\n")
            self._waiting += len(data) + 1
            self._trim()
            self._wake.notify()

    def recent(self) -> list[Entry]:
        """Return the last entries, the newest last, those of earlier agents included. Their parts are left out."""
        with self._wake:
            return list(self._recent)

    def document(self) -> dict[str, Any]:
        """Return the last entries for JSON."""
        return {"entries": [entry.to_dict() for entry in self.recent()]}

    def close(self) -> None:
        """Write what waits, for two seconds at most, and stop."""
        with self._wake:
            self._stopping = True
            self._summarize()
            self._wake.notify()
        if self._thread:
            self._thread.join(_LAST)

    # The thread

    def _run(self) -> None:
        unsynced, sync_at, retry_at = False, 0.0, 0.0
        while True:
            with self._wake:
                while not self._stopping:
                    self._summarize()
                    due = min(retry_at if self._pending else math.inf, sync_at if unsynced else math.inf)
                    due = min(due, self._window_end)
                    now = time.monotonic()
                    if now >= due and due != self._window_end:
                        break
                    self._wake.wait(None if due == math.inf else max(0.0, due - now))
                stopping = self._stopping
                batch = deque[bytes]()
                if stopping or time.monotonic() >= retry_at:
                    batch, self._pending, self._waiting = self._pending, batch, 0
            wrote = bool(batch)
            try:
                if batch:
                    unsynced = True
                    self._write(batch)
                if unsynced and (stopping or time.monotonic() >= sync_at):
                    self._sync()
                    unsynced, sync_at = False, time.monotonic() + _SYNC
                retry_at = 0.0
                if wrote:
                    self._written("")
            except OSError as error:
                unsynced, retry_at = False, time.monotonic() + _AGAIN
                self._written(error.strerror or str(error))
            if stopping:
                return
            with self._wake:
                self._pending.extendleft(reversed(batch))
                self._waiting += sum(map(len, batch))
                self._trim()

    def _trim(self) -> None:
        while self._waiting > _PENDING:
            self._waiting -= len(self._pending.popleft())

    def _written(self, why: str) -> None:
        """Log once that the file can't be written, and once that it can again. `why` is "" where it was written."""
        if why and not self._failing:
            log.warning("%s can't be written: %s; what happens until it can is not in the history", self._path, why)
        elif self._failing and not why:
            log.info("%s is written again", self._path)
        self._failing = bool(why)

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / HISTORY_FILES[0]

    def _write(self, lines: deque[bytes]) -> None:
        """Append lines, and begin another file where this one would be too long. What is written leaves `lines`.

        Raise OSError; the file ends with a whole line all the same.
        """
        while lines:
            handle, size = _open(self._path)
            try:
                while lines and (not size or size + len(lines[0]) <= _MOST):
                    if os.write(handle, lines[0]) != len(lines[0]):
                        os.ftruncate(handle, size)
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    size += len(lines.popleft())
            finally:
                os.close(handle)
            if lines and size <= _MOST:
                os.replace(self._path, self._path.with_name(HISTORY_FILES[1]))
            elif lines:
                # something else wrote it: it would be more than the history may have
                self._path.unlink()

    def _sync(self) -> None:
        handle, _ = _open(self._path)
        try:
            os.fdatasync(handle)
        finally:
            os.close(handle)


def _open(path: Path) -> tuple[int, int]:
    """Return a descriptor that appends to the file, and its size. Raise OSError. End a line that was torn."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    handle = os.open(path, flags, 0o600)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        if found.st_size and os.pread(handle, 1, found.st_size - 1) != b"\n":
            os.write(handle, b"\n")
        return handle, os.fstat(handle).st_size
    except BaseException:
        os.close(handle)
        raise


def _line(text: str) -> str:
    return text if len(text) <= _TEXT and text.isprintable() else printable(text, _TEXT, " ")


def _bounded(parts: Iterable[str]) -> tuple[str, ...]:
    """Return the parts that one entry holds."""
    left, found = _LINE, []
    for part in parts:
        left -= len(part) + 4
        if left < 0:
            break
        found.append(_line(part))
    return tuple(found)


# Reading


def read(folder: str | os.PathLike[str], since: float = 0.0, most: int | None = None) -> list[Entry]:
    """Return the entries of a state directory from `since` (seconds since the epoch) on, the newest last.

    Of the last `most` lines only, where that is given. Needs no agent.
    Raise OvsmeshError if a file is there and can't be read.
    """
    lines: list[bytes] = []
    seen = set()
    # the newer is opened first: when it becomes the older one meanwhile, nothing is left out
    for name in HISTORY_FILES:
        path = Path(folder) / name
        if most is not None and len(lines) >= most:
            break
        try:
            data, identity = _tail(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            root = "; run it as root (sudo)" if isinstance(error, PermissionError) else ""
            raise OvsmeshError(f"{path}: can't be read: {error.strerror or error}{root}") from error
        if identity not in seen:
            seen.add(identity)
            lines[:0] = filter(None, data.split(b"\n"))
    if most is not None:
        lines = lines[-most:]
    return [entry for entry in map(_entry, lines) if entry is not None and entry.time >= since]


def _tail(path: Path) -> tuple[bytes, tuple[int, int]]:
    """Return the end of a file, as much as may be in it, and what tells it from others. Raise OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        start = max(0, found.st_size - _MOST)
        file.seek(start)
        data = file.read(_MOST)
    return data.partition(b"\n")[2] if start else data, (found.st_dev, found.st_ino)


def _entry(line: bytes) -> Entry | None:
    """Return what a line holds; None for one that is torn or of another shape."""
    try:
        found = json.loads(line) if line else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    when, event, what, who = (found.get(key) for key in ("time", "event", "what", "who"))
    at = seconds(when) if isinstance(when, str) else None
    if at is None or not isinstance(event, str) or not isinstance(what, str):
        return None
    who = _line(who) if isinstance(who, str) else ""
    return Entry(at, printable(event, 32), _line(what), who, _number(found.get("took")), tuple(_texts(found)))


def _texts(found: dict[str, Any]) -> Iterator[str]:
    parts = found.get("parts")
    yield from (_line(part) for part in (parts if isinstance(parts, list) else ()) if isinstance(part, str))


def _number(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) and number >= 0 else None
