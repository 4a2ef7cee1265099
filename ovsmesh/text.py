"""Make texts of others fit for one line, long lists short, numbers agree with their nouns, and times readable."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from datetime import UTC, datetime

_YEAR_9999 = 253370764800.0
"""Seconds since the epoch."""


def printable(text: object, most: int | None = None, instead: str = "?") -> str:
    """Return at most `most` characters, with `instead` for what could steer a terminal or break a line."""
    return "".join(c if c.isprintable() else instead for c in str(text)[:most])


def some(items: Iterable[object], most: int = 10) -> list[str]:
    """Return the first items as texts and, where there are more, a last one that says how many."""
    every = list(items)
    more = [f"and {len(every) - most} more"] if len(every) > most else []
    return [*map(str, every[:most]), *more]


def listed(items: Iterable[object], most: int = 10, separator: str = ", ") -> str:
    """Return the first items as one text, and how many more there are."""
    return separator.join(some(items, most))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, as "1 peer" or "2 peers"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a duration as a reader says it: 12 ms, 3.4 s, 2 min 5 s, 3 h 10 min, 5 d 2 h."""
    if seconds < 0.9995:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {small}" if rest else "")
    raise AssertionError(seconds)


def nearest(name: str, names: Iterable[str], alike: float = 0.6) -> str:
    """Return the one of `names` that `name` is most likely a misspelling of; "" where none is like it.

    `alike`: how alike the two are at least, of 1.
    """
    known = {each.lower(): each for each in sorted(names)}
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=alike)
    return known[found[0]] if found else ""


def instead(name: str, names: Iterable[str], most: int = 10) -> str:
    """Return what to offer in place of a wrong name, as "did you mean web2? There are web1, web2, web3"."""
    known = sorted(names)
    like = nearest(name, known)
    there = f"there is {known[0]} only" if len(known) == 1 else f"there are {listed(known, most)}"
    if not known:
        return "there is none"
    return f"did you mean {like}? T{there[1:]}" if like else there


def timestamp(seconds: float) -> str:
    """Return a time as RFC 3339 in UTC, to the second."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(text: str) -> float | None:
    """Return an RFC 3339 time in seconds since the epoch; None for another text. Without a zone it is this host's."""
    try:
        found = datetime.fromisoformat(text).timestamp() if len(text) < 64 else math.nan
    except (ValueError, OverflowError, OSError):
        return None
    return found if 0 <= found < _YEAR_9999 else None


def clock(seconds: float, now: float) -> str:
    """Return a time for a reader, in UTC: as "14:02:11Z", with the date where it is more than a day from now."""
    form = "%H:%M:%SZ" if abs(now - seconds) < 86400 else "%Y-%m-%d %H:%M:%SZ"
    return datetime.fromtimestamp(int(seconds), UTC).strftime(form)


def age(seconds: float) -> str:
    """Return a duration in two units at most, as kubectl shows it: 45s, 3m5s, 2h10m, 5d."""
    left = max(0, int(seconds))
    if left < 60:
        return f"{left}s"
    if left < 3600:
        return f"{left // 60}m{left % 60}s"
    if left < 86400:
        return f"{left // 3600}h{left % 3600 // 60}m"
    return f"{left // 86400}d"
