"""What a bench measured: figures, their table, their JSON.

A figure that is compared carries the samples of what it is compared with, taken in the same run and alternating with
its own, so a busy machine slows both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the sample at or below which a `share` (0 to 1) of all samples is (nearest rank)."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity. `samples` and `baseline` are in `unit`."""

    bench: str
    name: str
    unit: str
    samples: tuple[float, ...]
    baseline_name: str = ""
    baseline: tuple[float, ...] = ()
    bound: float | None = None
    """The goal for the median, in `unit`; for the maximum with `bound_on_max`."""
    ratio_bound: float | None = None
    """The goal for the ratio."""
    bound_on_max: bool = False
    note: str = ""

    @property
    def p50(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    @property
    def ratio(self) -> float | None:
        """The median divided by that of what it is compared with."""
        below = statistics.median(self.baseline) if self.baseline else 0.0
        return self.p50 / below if below else None

    @property
    def holds(self) -> bool | None:
        """Whether what is asked for holds; None where nothing is."""
        checks = []
        if self.bound is not None:
            checks.append((max(self.samples) if self.bound_on_max else self.p50) <= self.bound)
        if self.ratio_bound is not None and self.ratio is not None:
            checks.append(self.ratio <= self.ratio_bound)
        return all(checks) if checks else None

    def to_dict(self) -> dict[str, Any]:
        """Return the figure as JSON has it."""
        return {
            "bench": self.bench,
            "name": self.name,
            "unit": self.unit,
            "n": len(self.samples),
            "p50": self.p50,
            "p99": percentile(self.samples, 0.99),
            "max": max(self.samples),
            "min": min(self.samples),
            "samples": list(self.samples),
            "baseline": {"name": self.baseline_name, "samples": list(self.baseline)} if self.baseline else None,
            "ratio": self.ratio,
            "bound": self.bound,
            "ratioBound": self.ratio_bound,
            "holds": self.holds,
            "note": self.note,
        }


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"1/{1 / ratio:.1f}" if 0 < ratio < 0.5 else f"{ratio:.2f}"


def _wanted(figure: Figure) -> str:
    words = []
    if figure.bound is not None:
        words.append(f"{'max ' if figure.bound_on_max else ''}≤ {_number(figure.bound)} {figure.unit}".strip())
    if figure.ratio_bound is not None:
        words.append(f"ratio ≤ {_ratio(figure.ratio_bound)}")
    return ", ".join(words)


_HEADS = ("figure", "unit", "n", "p50", "p99", "max", "baseline", "p50", "ratio", "wanted", "")


def table(figures: Sequence[Figure]) -> str:
    """Return all figures as a text table: a section for each bench, a note below its figure."""
    rows: list[tuple[str, ...]] = []
    for f in figures:
        baseline = _number(statistics.median(f.baseline)) if f.baseline else ""
        spread = (_number(f.p50), _number(percentile(f.samples, 0.99)), _number(max(f.samples)))
        verdict = {None: "", True: "holds", False: "MISSED"}[f.holds]
        cells = (f.name, f.unit, str(len(f.samples)), *spread, f.baseline_name, baseline, _ratio(f.ratio), _wanted(f))
        rows.append((*cells, verdict))
    widths = [max(len(row[n]) for row in (*rows, _HEADS)) for n in range(len(_HEADS))]
    right = {2, 3, 4, 5, 7, 8}

    def line(row: Sequence[str]) -> str:
        cells = (c.rjust(w) if n in right else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    out, last = [line(_HEADS)], ""
    for figure, row in zip(figures, rows, strict=True):
        if figure.bench != last:
            out += ["", figure.bench]
            last = figure.bench
        out.append(line(row))
        if figure.note:
            out.append(f"    {figure.note}")
    return "\n".join(out)
