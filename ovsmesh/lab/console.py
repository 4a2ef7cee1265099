"""What `ovsmesh lab` prints: steps with their times, the ping matrix at any size, the end of a lab.

Text carries rich's markup. It is shown in colour on a terminal where rich is installed (the extra `lab`), else as
plain text.
"""

from __future__ import annotations

import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import IO, TYPE_CHECKING, Any

from ovsmesh.errors import OvsmeshError
from ovsmesh.lab.ping import Track

if TYPE_CHECKING:
    from ovsmesh.lab.lab import Lab

_PLAIN_WIDTH = 100
"""Columns when the output is no terminal and COLUMNS is not set."""
_TAG = re.compile(r"\[(?:/|(?:bold )?(?:bold|dim|red|green|yellow))\]")
_CELL = 7
"""Columns of a cell that holds a round-trip time."""
_SYMBOLS = {"ok": "[green]•[/]", "partly": "[yellow]◐[/]", "none": "[bold red]✗[/]", "self": "[dim]·[/]"}
_SHOWN = 5
"""Failed pairs that the summary names."""

Cells = Mapping[tuple[str, str], Track]
"""What became of the packets of each (source, target)."""


class Console:
    """Prints lines to `file`, standard output unless given. `width` is in columns."""

    def __init__(self, file: IO[str] | None = None, width: int = 0) -> None:
        self._file = file or sys.stdout
        self.width = width or shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns
        self._rich: Any = None
        if self._file.isatty():
            try:
                from rich.console import Console as RichConsole
            except ImportError:
                return
            self._rich = RichConsole(file=self._file, width=self.width, highlight=False)

    def print(self, text: str = "", markup: bool = True) -> None:
        """Print one or more lines. Text of unknown content needs `markup=False`."""
        if self._rich:
            self._rich.print(text, markup=markup, soft_wrap=True)
        else:
            print(_TAG.sub("", text) if markup else text, file=self._file, flush=True)

    def heading(self, text: str) -> None:
        """Print a line that begins a section."""
        self.print(f"[bold]{text}[/] [dim]{'─' * (self.width - len(text) - 1)}[/]")

    def status(self, text: str) -> AbstractContextManager[Any]:
        """Show what is being done while the context lasts, where that can be taken away again."""
        return self._rich.status(text) if self._rich else nullcontext()


class Steps:
    """Shows each step while it runs, and when it ends prints a line with its seconds."""

    def __init__(self, out: Console) -> None:
        self.out = out

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Show the step `name` while the context lasts."""
        start, mark = time.monotonic(), "[red]✗[/]"
        try:
            with self.out.status(name):
                yield
            mark = "[green]✓[/]"
        finally:
            self.out.print(f"{mark} {name:<62} [dim]{time.monotonic() - start:6.2f} s[/]")


@contextmanager
def taken_down(out: Console, lab: Lab) -> Iterator[None]:
    """End the lab when the context ends. After an error print the end of some agents' logs first."""
    try:
        yield
    except OvsmeshError:
        if lab.state.exists():
            out.print("\n".join(host.logs(12, "agent.log") for host in lab.hosts[:3]), markup=False)
        raise
    finally:
        # a lab of that name that was there before is not this command's to end
        if lab.made:
            proof = lab.down()
            out.print(f"{'[green]✓[/]' if proof.ok else '[red]✗[/]'} {proof}")


def failed(track: Track) -> bool:
    """Return whether a packet of this pair was lost or answered twice."""
    return bool(track.lost or track.duplicates)


def show_matrix(out: Console, tracks: Sequence[Track]) -> None:
    """Print which pod reaches which: a row pings a column. Then print a summary.

    A cell is the median round trip in ms where that fits the width, else one character.
    """
    families = {version: [t for t in tracks if mark in t.pair.address] for version, mark in ((4, "."), (6, ":"))}
    for version, chosen in families.items():
        if not chosen:
            continue
        if families[6]:
            out.print(f"[bold]IPv{version}[/]")
        pods = list(dict.fromkeys([*(t.pair.source for t in chosen), *(t.pair.target for t in chosen)]))
        cells = {(t.pair.source, t.pair.target): t for t in chosen}
        first = max(map(len, pods)) + 1
        fits = first + len(pods) * _CELL <= out.width
        out.print("\n".join(_times(pods, cells, first) if fits else _symbols(pods, cells, first, out.width)))
    show_summary(out, tracks)


def _times(pods: Sequence[str], cells: Cells, first: int) -> Iterator[str]:
    yield f"[bold]{'ms':<{first}}{''.join(f'{pod:>{_CELL}}' for pod in pods)}[/]"
    for source in pods:
        yield f"[bold]{source:<{first}}[/]" + "".join(_time(cells.get((source, target))) for target in pods)


def _time(track: Track | None) -> str:
    text, style = "·", "dim"
    if track is not None:
        rtt = track.rtt
        if rtt is None:
            text, style = "lost", "bold red"
        elif track.lost:
            text, style = f"-{track.lost}/{len(track.sent)}", "yellow"
        elif track.duplicates:
            text, style = "twice", "bold red"
        else:
            text, style = f"{rtt:.2f}" if rtt < 100 else f"{rtt:.0f}", "green"
    return f"[{style}]{text:>{_CELL}}[/]"


def _symbols(pods: Sequence[str], cells: Cells, first: int, width: int) -> Iterator[str]:
    """Columns in blocks that fit the width; above each host's first pod stands the host's number."""
    for start in range(0, len(pods), max(1, width - first)):
        block = pods[start : start + width - first]
        yield from (f"[bold]{' ' * first}{line}[/]" for line in _host_numbers(block))
        for source in pods:
            symbols = (_SYMBOLS[_state(cells.get((source, target)))] for target in block)
            yield f"{source:<{first}}{''.join(symbols)}"
    yield "[dim]• all answered  ◐ some lost  ✗ none[/]"


def _host_numbers(pods: Sequence[str]) -> list[str]:
    """Return two lines, tens over ones, so that a number fits a host of one pod. Empty lines are left out."""
    hosts = [pod.removeprefix("h").partition("p")[0] for pod in pods]
    firsts = [host if place == 0 or hosts[place - 1] != host else "" for place, host in enumerate(hosts)]
    lines = ["".join(f"{host:>2}"[row] for host in firsts).rstrip() for row in (0, 1)]
    return [line for line in lines if line]


def _state(track: Track | None) -> str:
    if track is None:
        return "self"
    if not track.received:
        return "none"
    return "partly" if failed(track) else "ok"


def show_summary(out: Console, tracks: Sequence[Track]) -> None:
    """Print how many pairs and packets were answered, the round trips, and the first pairs that failed."""
    out.print("\n".join(_summary(tracks)))


def _summary(tracks: Sequence[Track]) -> Iterator[str]:
    bad = [t for t in tracks if failed(t)]
    sent, lost, twice = (sum(n) for n in zip(*((len(t.sent), t.lost, t.duplicates) for t in tracks), strict=True))
    style = "bold red" if bad else "bold green"
    answered = f"{len(tracks) - len(bad)} of {len(tracks)} pairs answered"
    yield f"[{style}]{answered}[/]; {sent} packets, {lost} lost, {twice} twice"
    if times := sorted(rtt for t in tracks for rtt in t.rtts):
        yield f"round trip {statistics.median(times):.2f} ms median, {times[-1 - len(times) // 100]:.2f} ms p99"
    for track in bad[:_SHOWN]:
        reason = f" ({', '.join(track.errors)})" if track.errors else ""
        pair = f"{track.pair.source} → {track.pair.target} {track.pair.address}"
        yield f"  [red]{pair}:[/] {track.lost} of {len(track.sent)} lost, {track.duplicates} twice{reason}"
    if len(bad) > _SHOWN:
        yield f"  [red]and {len(bad) - _SHOWN} more[/]"
