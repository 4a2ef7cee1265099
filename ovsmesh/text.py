"""Make texts of others fit for one line, long lists short, and numbers agree with their nouns."""

from __future__ import annotations

from collections.abc import Iterable


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
