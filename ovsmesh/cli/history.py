"""`ovsmesh history`: what changed, drifted, broke and recovered on this node. It reads the file, and needs no agent."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from ovsmesh import history
from ovsmesh.errors import OvsmeshError
from ovsmesh.state_dir import StateDir
from ovsmesh.text import seconds

_AGO = re.compile(r"([0-9]{1,9})([smhd])", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WIDTH = max(map(len, history.Event))


def start(since: str, now: float) -> float:
    """Return what `--since` means in seconds since the epoch. Raise OvsmeshError for what it does not take."""
    ago = _AGO.fullmatch(since)
    if ago:
        return max(0.0, now - int(ago[1]) * _UNITS[ago[2]])
    found = seconds(since)
    if found is None:
        wanted = "how long ago, as in 30s, 10m, 1h or 2d, or a time, as in 2026-11-29T14:00:00Z"
        raise OvsmeshError(f"--since {since[:80]!a}: wanted {wanted}")
    return found


def wrong_since(text: str) -> str:
    """Return why this is no value of `--since`, "" if it is one."""
    try:
        start(text, time.time())
    except OvsmeshError as error:
        return str(error).rpartition(": ")[2]
    return ""


def entries(state_dir: str, since: str = "") -> list[history.Entry]:
    """Return the entries since then, or all. Raise OvsmeshError where there can't be any, or they can't be read."""
    begin = start(since, time.time()) if since else 0.0
    try:
        there = StateDir(state_dir).path.is_dir()
    except OSError:
        there = True
    if not there:
        raise OvsmeshError(f"{state_dir}: no agent has run with this state directory; give --state-dir another")
    return history.read(state_dir, begin)


def lines(found: list[history.Entry]) -> Iterator[str]:
    """Yield the entries for a reader, the newest last, in this host's time."""
    for entry in found:
        when = datetime.fromtimestamp(entry.time).astimezone().isoformat(" ", "milliseconds")
        yield f"{when}  {entry.event:{_WIDTH}}  {entry.text}"
        for part in entry.parts:
            yield f"    {part}"


def tree(found: list[history.Entry]) -> dict[str, Any]:
    """Return the entries as JSON has them."""
    return {"entries": [entry.to_dict() for entry in found]}
