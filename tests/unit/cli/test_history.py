"""`ovsmesh history`: it reads the file, agent or no agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ovsmesh.cli import history
from ovsmesh.cli.main import cli
from ovsmesh.errors import OvsmeshError
from ovsmesh.history import Entry

NOW = 1_800_000_000.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = [
        Entry(NOW - 3600, "start", "ovsmesh starts"),
        Entry(
            NOW, "drift", "4 routes (a, b, c, and 1 more) were deleted by someone", "someone", 0.5, ("a", "b", "c", "d")
        ),
    ]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(entry.to_dict()) + "\n" for entry in found))
    return tmp_path


def invoke(*argv: Any) -> Any:
    return CliRunner().invoke(cli, ["history", *map(str, argv)])


def test_a_line_an_entry_and_the_parts_that_it_does_not_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = invoke("--state-dir", folder)
    first, second, *parts = done.output.splitlines()
    assert done.exit_code == 0 and first.endswith("  start      ovsmesh starts")
    assert second.endswith("were deleted by someone; restored after 500 ms")
    assert [part.strip() for part in parts] == ["a", "b", "c", "d"]


def test_json_has_the_same(folder: Path) -> None:
    start, drift = json.loads(invoke("--state-dir", folder, "-o", "json").output)["entries"]
    assert start["time"] == "2027-01-15T07:00:00.000Z" and start["took"] is None
    assert (drift["event"], drift["took"], drift["parts"]) == ("drift", 0.5, ["a", "b", "c", "d"])


def test_since_shows_what_is_newer(folder: Path) -> None:
    assert "ovsmesh starts" not in invoke("--state-dir", folder, "--since", "2027-01-15T07:30:00Z").output


def test_nothing_is_said_to_be_nothing(tmp_path: Path) -> None:
    done = invoke("--state-dir", tmp_path)
    assert done.exit_code == 0 and done.output == "nothing\n"


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = invoke("--state-dir", tmp_path / "nope")
    assert done.exit_code == 1 and "no agent has run with this state directory" in str(done.exception)


@pytest.mark.parametrize(
    ("text", "ago"),
    [("30s", 30), ("10m", 600), ("1h", 3600), ("2d", 172800), ("0s", 0), ("2027-01-15T08:00:00Z", 0),
     ("2027-01-15T09:00:00+01:00", 0), ("2027-01-15T07:59:59.5Z", 0.5), ("99999999d", NOW)],
)  # fmt: skip
def test_what_since_takes(text: str, ago: float) -> None:
    assert history.start(text, NOW) == NOW - ago


@pytest.mark.parametrize(
    "text", ["", "1", "h", "1w", "1h30m", "-1h", "yesterday", "1\u0661h", "1e3s", "2026-99-01T00:00:00Z"]
)
def test_what_since_does_not_take(text: str) -> None:
    with pytest.raises(OvsmeshError, match=r"--since .* wanted how long ago, as in 30s, 10m, 1h or 2d, or a time"):
        history.start(text, NOW)
