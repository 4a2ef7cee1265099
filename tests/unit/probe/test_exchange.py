"""What agents ask each other, and what becomes of the answers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from typing import Any

import pytest

from ovsmesh.dataplane.types import Facts
from ovsmesh.probe import exchange, matrix
from ovsmesh.probe.exchange import RowServer, collect
from ovsmesh.probe.matrix import Cell, Row
from ovsmesh.probe.targets import targets
from tests.support.meshkit import mesh_of, node

LARGE = mesh_of(*(node(f"n{n:03}", f"192.0.{n // 250}.{n % 250}", f"10.{n // 250}.{n % 250}.0/24") for n in range(200)))
NAMES = [one.name for one in LARGE.nodes]


def whole(name: str) -> Row:
    """The row of a node that reaches all others, n007 least well."""
    cells = tuple(Cell(peer, "ok", 1.0, 0.05 if peer == "n007" else 0.001) for peer in NAMES if peer != name)
    return Row(name, 1.8e9, counts={"ok": 199}, cells=cells)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, ...]]]:
    """What was asked about; the agents of n100 and n101 are silent."""
    questions: list[tuple[str, ...]] = []

    def ask(paths: Mapping[str, Any], limit: int, seconds: float = 0.0, about: Collection[str] = ()) -> Any:
        questions.append(tuple(about))
        rows = [whole(name) for name in paths if name not in ("n100", "n101")]
        found = {row.node: (row.about(about) if about else row).worst(200).encode() for row in rows}
        assert all(len(data) < limit for data in found.values())
        return found

    monkeypatch.setattr(exchange, "ask", ask)
    yield questions


def cells(found: Any) -> dict[tuple[str, str], Any]:
    return {(row["node"], cell["peer"]): cell for row in found["rows"] for cell in row["cells"]}


@pytest.mark.parametrize("own", [whole("n000"), None])
def test_in_a_large_mesh_a_silent_row_is_asked_of_the_others(asked: list[tuple[str, ...]], own: Row | None) -> None:
    found = collect(LARGE, targets(LARGE, "n000", Facts()), own, {})
    silent = ("n100", "n101") if own else ("n000", "n100", "n101")
    assert asked == [(), silent]
    rows = {row["node"]: row for row in found["rows"]}
    # what the two measured of each other nobody tells
    expected = {"ok": 198, "unknown": 1} if own else {"ok": 197, "unknown": 2}
    assert rows["n100"]["counts"] == expected and not found["complete"]
    by = cells(found)
    assert by["n100", "n101"]["state"] == "unknown" and by["n100", "n007"]["fromOtherEnd"]
    assert rows["n050"]["counts"] == {"ok": 199} and len(rows["n050"]["cells"]) <= 100 + len(silent)
    # the worst are there
    assert by["n050", "n007"]["roundTrip"] == 0.05


def test_what_was_told_is_kept_without_its_cells(asked: list[tuple[str, ...]]) -> None:
    last = {"gone": whole("gone")}
    collect(LARGE, targets(LARGE, "n000", Facts()), whole("n000"), last)
    assert last.keys() == set(NAMES) - {"n100", "n101"}
    assert not any(row.cells or row.counts for row in last.values())


def test_names_that_do_not_fit_one_request_are_left_out() -> None:
    names = [f"{n:02}-{'x' * 200}" for n in range(20)]
    assert exchange._fitting(names) == names[:4]


@pytest.mark.parametrize(
    ("request_line", "code", "about"),
    [
        (b"GET /row.json HTTP/1.0", 200, frozenset()),
        (b"GET /row.json?n1&a%20b HTTP/1.0", 200, frozenset({"n1", "a b"})),
        (b"GET /row.json", 200, frozenset()),
        (b"GET /row.json?&&=%ff HTTP/1.0", 200, frozenset({"=\ufffd"})),
        (b"GET / HTTP/1.0", 404, None),
        (b"POST /row.json HTTP/1.0", 404, None),
        (b"\xff\x00", 404, None),
        (b"", 404, None),
    ],
)
def test_one_thing_is_answered(request_line: bytes, code: int, about: frozenset[str] | None) -> None:
    wanted: list[Collection[str]] = []

    def row(about: Collection[str]) -> bytes:
        wanted.append(about)
        return b"{}"

    with closing(RowServer(row)) as server:
        head, _, body = server._answer(request_line + b"\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 %d " % code) and b"Content-Length: %d" % len(body) in head
    assert wanted == ([] if about is None else [about])


def test_without_a_mesh_there_is_no_row() -> None:
    with closing(RowServer(lambda _: None)) as server:
        assert server._answer(b"GET /row.json HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 503 ")


def test_a_row_of_all_peers_fits_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    full = [Cell("n" * 253, "small packets only", 1.8e9, 59.123456, 59.123456, 0.999999, 65535) for _ in range(100)]
    row = Row("n" * 253, 1.8e9, "x" * 300, "1" * 40, "d" * 12, True, True, 1.8e9, {}, {}, tuple(full))
    assert len(row.encode()) < matrix.most_bytes(100)
