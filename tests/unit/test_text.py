"""Texts of others fit one line, and long lists are short."""

from __future__ import annotations

import pytest

from ovsmesh.text import age, clock, counted, instead, listed, nearest, printable, seconds, some


@pytest.mark.parametrize(
    ("text", "shown"), [("→ − ok", "→ − ok"), ("a\x1b[2J\nb\u2028", "a?[2J?b?"), ("x" * 99, "x" * 99), (7, "7")]
)
def test_what_could_steer_a_terminal_is_replaced(text: object, shown: str) -> None:
    assert printable(text) == shown


def test_printable_is_cut_and_takes_another_substitute() -> None:
    assert printable("a\nbcd", 3, " ") == "a b"


@pytest.mark.parametrize(
    ("count", "shown"), [(0, ""), (1, "1"), (3, "1, 2, 3"), (4, "1, 2, 3, and 1 more"), (9, "1, 2, 3, and 6 more")]
)
def test_a_long_list_says_how_many_more(count: int, shown: str) -> None:
    assert listed(range(1, count + 1), 3) == shown
    assert ", ".join(some(iter(range(1, count + 1)), 3)) == shown


def test_a_number_agrees_with_its_noun() -> None:
    assert [counted(n, "peer") for n in (0, 1, 2)] == ["0 peers", "1 peer", "2 peers"]


@pytest.mark.parametrize(("name", "like"), [("wbe2", "web2"), ("WEB1", "web1"), ("db", ""), ("", ""), ("web2", "web2")])
def test_the_nearest_name_is_offered_for_a_misspelt_one(name: str, like: str) -> None:
    assert nearest(name, ["web2", "web1"]) == like


def test_the_nearest_of_names_that_differ_in_case_keeps_its_own_spelling() -> None:
    assert nearest("hostone", ["HostOne", "other"]) == "HostOne"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ((), "there is none"),
        (("web1",), "did you mean web1? There is web1 only"),
        (("db", "web1"), "did you mean web1? There are db, web1"),
        (("a", "b", "c", "d"), "there are a, b, c, and 1 more"),
    ],
)
def test_a_wrong_name_gets_the_nearest_and_the_list(names: tuple[str, ...], text: str) -> None:
    assert instead("wbe1", names, 3) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (59.9, "59s"), (60, "1m0s"), (3725, "1h2m"), (86400, "1d")],
)
def test_age(seconds: float, text: str) -> None:
    assert age(seconds) == text


@pytest.mark.parametrize(
    ("ago", "text"),
    [(0, "08:00:00Z"), (86399, "08:00:01Z"), (86400, "2027-01-14 08:00:00Z"), (-90000, "2027-01-16 09:00:00Z")],
)
def test_a_time_of_another_day_has_its_date(ago: float, text: str) -> None:
    assert clock(1_800_000_000.0 - ago, 1_800_000_000.0) == text


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("1970-01-01T00:00:10Z", 10.0),
        ("1970-01-01T01:00:10.5+01:00", 10.5),
        ("", None),
        ("yesterday", None),
        ("0001-01-01T00:00:00", None),
        ("9999-12-31T23:59:59-12:00", None),
        ("1969-12-31T23:59:59Z", None),
        ("2026-11-29T00:00:00Z" + " " * 100, None),
    ],
)
def test_a_time_that_someone_else_wrote(text: str, at: float | None) -> None:
    assert seconds(text) == at
