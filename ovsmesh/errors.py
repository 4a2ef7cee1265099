"""What goes wrong, as types: the error that ends a command and the problem that a report names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ovsmesh.reasons import Reason, Severity
from ovsmesh.text import counted, listed


class OvsmeshError(Exception):
    """A failure that a user can cause and correct. Its text is shown as it is, without a traceback."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as wanted: where, what was found, why, what to do."""

    reason: Reason
    message: str
    node: str = ""
    """The node that it is about; "" for this one or for all."""
    field: str = ""
    """Path inside that node's entry."""
    value: str = ""
    """What was found there."""
    fatal: bool | None = None
    """False: the node converges all the same. Taken from the reason's severity where it is not given."""

    def __post_init__(self) -> None:
        """Fill in `fatal`."""
        if self.fatal is None:
            object.__setattr__(self, "fatal", self.reason.severity is Severity.ERROR)

    @property
    def wrong(self) -> bool:
        """Whether something is not as wanted, here or at another node; else the node just works without something."""
        return bool(self.fatal) or self.reason.severity is Severity.ERROR

    def __str__(self) -> str:
        where = f"node {self.node}: " if self.node else ""
        what = f"{' '.join(filter(None, (self.field, self.value)))}: " if self.field else ""
        return f"{where}{what}{self.message}"


def grouped(problems: Iterable[Problem]) -> list[str]:
    """Return a line for each kind of problem: the first one in full, and at which other nodes it is."""
    kinds: dict[object, list[Problem]] = {}
    for problem in problems:
        kind = (problem.reason, re.sub(r"\d+", "", problem.field), problem.fatal) if problem.node else str(problem)
        kinds.setdefault(kind, []).append(problem)
    lines = []
    for first, *others in kinds.values():
        nodes = [name for name in dict.fromkeys(other.node for other in others) if name != first.node]
        same = f". The same at {counted(len(nodes), 'other node')}: {listed(nodes, 3)}" if nodes else ""
        lines.append(f"{first}{same}")
    return lines


def summary(problems: Iterable[Problem]) -> str:
    """Return the first few kinds of problems as one line, for an error that ends a command."""
    return listed(grouped(problems), 3, "; ")
