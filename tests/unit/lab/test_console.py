"""The ping matrix is readable, with and without a terminal, with and without rich."""

from __future__ import annotations

import io
import re
import sys

import pytest

from ovsmesh.lab.console import Console, Steps, show_matrix
from tests.support.labpackets import track


@pytest.mark.parametrize(("hosts", "pods"), [(5, 2), (10, 3), (20, 3), (20, 6)])
def test_the_matrix_is_readable_at_80_columns(hosts: int, pods: int) -> None:
    places = [f"h{h}p{p}" for h in range(1, hosts + 1) for p in range(1, pods + 1)]
    tracks = [track(3, {0: 0.0003, 1: 1.0004, 2: 2.0003}, a, b) for a in places for b in places if a != b]
    tracks[1] = track(3, {}, tracks[1].pair.source, tracks[1].pair.target)
    file = io.StringIO()
    show_matrix(Console(file, width=80), tracks)
    text = file.getvalue()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert f"{len(tracks) - 1} of {len(tracks)} pairs answered" in text
    assert "h1p1 → " in text and "3 of 3 lost" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(file: io.StringIO) -> str:
    out = Console(file, width=80)
    pairs = [("h1p1", "h2p1"), ("h2p1", "h1p1")]
    show_matrix(out, [track(1, {} if pair == pairs[0] else {0: 0.5}, *pair) for pair in pairs])
    out.print("[red]as it is[/]", markup=False)
    with Steps(out)("a step"):
        pass
    return re.sub(r"\d\.\d\d s", "0.00 s", file.getvalue())


@pytest.fixture
def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich", "rich.console"):
        monkeypatch.setitem(sys.modules, name, None)


def test_a_terminal_gets_the_same_lines_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain, coloured = printed(io.StringIO()), printed(Terminal())
    assert "\x1b[1;31m" in coloured and "\x1b" not in plain
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", coloured)
    assert [line for line in plain.splitlines() if line not in shown] == []
    assert "[red]as it is[/]" in plain and "[bold" not in plain


def test_without_rich_a_terminal_gets_plain_text(without_rich: None) -> None:
    assert printed(Terminal()) == printed(io.StringIO())
