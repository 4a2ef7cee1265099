"""What goes wrong, as types: the error that ends a command and the problem that a report names."""

from __future__ import annotations

from dataclasses import dataclass

from ovsmesh.reasons import Reason, Severity


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

    def __str__(self) -> str:
        where = f"node {self.node}: " if self.node else ""
        what = f"{' '.join(filter(None, (self.field, self.value)))}: " if self.field else ""
        return f"{where}{what}{self.message}"
