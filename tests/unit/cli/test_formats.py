"""Showing a view once and again: what is printed, when, and with which exit status it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from ovsmesh.cli import formats
from ovsmesh.cli.formats import View, show, watch
from ovsmesh.errors import OvsmeshError


def of(text: str, code: int = 0) -> View:
    return View(text, {"said": text}, code)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], View]]:
    """Return a reader of these views, a second of a clock apart; then somebody presses Ctrl-C."""
    clock = [0.0]

    class Time:
        @staticmethod
        def monotonic() -> float:
            return clock[0]

        @staticmethod
        def sleep(seconds: float) -> None:
            clock[0] += seconds

    monkeypatch.setattr(formats, "time", Time)

    def make(*views: Any) -> Callable[[], View]:
        left = [*views, KeyboardInterrupt()]

        def read() -> View:
            found = left.pop(0)
            if isinstance(found, BaseException):
                raise found
            assert isinstance(found, View)
            return found

        return read

    return make


def test_what_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(lambda: of("a\nb\n", 2), "table") == 2
    assert show(lambda: of("a"), "json") == 0
    assert capsys.readouterr().out == 'a\nb\n{\n  "said": "a"\n}\n'


def test_a_change_is_shown_at_once_else_every_two_seconds(looks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch(looks(of("a"), of("a"), of("b"), of("b", 2)), "json") == 2
    # at 0, 2 and no earlier than at 4 s
    assert [json.loads(line)["said"] for line in capsys.readouterr().out.splitlines()] == ["a", "b"]
    assert watch(looks(of("a"), of("b"), of("b"), of("b"), of("b")), "json") == 0
    assert [json.loads(line)["said"] for line in capsys.readouterr().out.splitlines()] == ["a", "b", "b"]


def test_an_error_is_shown_and_watched_on(looks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch(looks(of("a"), OvsmeshError("no mesh")), "json") == 1
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [{"said": "a"}, {"error": "no mesh"}]
    assert watch(looks(OvsmeshError("no mesh"), of("a")), "table") == 0
    assert capsys.readouterr().out == "ovsmesh: no mesh\n\na\n\n"


def test_yaml_is_a_stream_of_documents(looks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    watch(looks(of("a"), of("b")), "yaml")
    assert [document["said"] for document in yaml.safe_load_all(capsys.readouterr().out)] == ["a", "b"]


def test_a_terminal_is_drawn_over(
    looks: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    watch(looks(of("a\nlong"), of("b")), "table")
    first, second = capsys.readouterr().out.split("\x1b[H")[1:]
    assert first.startswith("a\x1b[K\nlong\x1b[K\n") and second.startswith("b\x1b[K\n") and second.endswith("\x1b[J")


def test_ctrl_c_before_anything_was_seen_is_cannot_tell(looks: Any) -> None:
    assert watch(looks(), "table") == 1
