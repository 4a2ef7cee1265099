"""What goes wrong, as types: the error that ends a command and the problem that a report names."""

from __future__ import annotations

from dataclasses import dataclass


class OvsmeshError(Exception):
    """Something a user can cause and mend; its text is shown as it is, without a traceback."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as wanted, said to the reader: where, what, why, what to do.

    `node` is the node it is about ("" for this one or for all), `field` the path inside its
    entry, `value` what was found there.
    """

    reason: str
    """CamelCase, stable: used as a condition reason and a metric label."""
    message: str
    node: str = ""
    field: str = ""
    value: str = ""
    fatal: bool = True
    """False: named, but the node converges all the same."""

    def __str__(self) -> str:
        where = f"node {self.node}: " if self.node else ""
        what = f"{' '.join(filter(None, (self.field, self.value)))}: " if self.field else ""
        return f"{where}{what}{self.message}"
