"""Log lines: one printable line a record, with a zone, a severity for journald, or JSON."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.history import Entry
from ovsmesh.logs import LineFormatter
from ovsmesh.state_dir import StateDir

HOSTILE = "a\nb\r\x1b[31m\u2028<0>c\u202e" + "x" * 100_000


def record(message: str = "hello", level: int = logging.INFO, **more: Any) -> logging.LogRecord:
    made = logging.LogRecord("ovsmesh", level, __file__, 1, "%s", (message,), more.pop("exc_info", None))
    made.created = 1_795_918_887.123
    vars(made).update(more)
    return made


def test_text_has_a_time_with_its_zone_and_the_severity() -> None:
    line = LineFormatter().format(record(level=logging.WARNING))
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\.123[+-]\d\d:\d\d WARNING hello", line)


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7)],
)
def test_journald_gets_a_severity_and_no_second_time(level: int, priority: int) -> None:
    assert LineFormatter(journal=True).format(record(level=level)) == f"<{priority}>hello"
    assert LineFormatter("json", journal=True).format(record(level=level)).startswith(f"<{priority}>" + '{"time"')


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("journal", [False, True])
def test_a_hostile_name_is_one_printable_line_and_no_severity_of_its_own(form: str, journal: bool) -> None:
    line = LineFormatter(form, journal).format(record(HOSTILE))
    assert line.isprintable() and len(line) < 20_000


def test_a_traceback_is_one_line() -> None:
    try:
        raise ValueError("no\nnumber")
    except ValueError:
        line = LineFormatter().format(record(exc_info=sys.exc_info()))
    assert line.isprintable() and line.endswith("ValueError: no | number")


def test_json_has_the_parts_of_an_entry_of_the_history() -> None:
    entry = Entry(0.0, "drift", "x was deleted by someone", "someone", 0.012)
    found = json.loads(LineFormatter("json").format(record("x", logging.WARNING, entry=entry)))
    assert found == {
        "time": "2026-11-29T02:21:27.123Z",
        "level": "warning",
        "message": "x",
        "event": "drift",
        "what": "x was deleted by someone",
        "who": "someone",
        "took": 0.012,
    }
    assert set(json.loads(LineFormatter("json").format(record()))) == {"time", "level", "message"}


def run(tmp_path: Path, *options: str, stream: Any, journal: str) -> None:
    """Start an agent that ends at once with an error: another one has its state directory."""
    state = StateDir(tmp_path / "s")
    argv = [sys.executable, "-m", "ovsmesh", "agent", "--mesh", "/nope", "--state-dir", str(state.path)]
    env = {**os.environ, "JOURNAL_STREAM": journal}
    state.lock()
    try:
        subprocess.run([*argv, *options], stderr=stream, env=env, timeout=60)
    finally:
        state.unlock()


@pytest.mark.parametrize(("options", "begin"), [((), "<3>/"), (("--log-format", "json"), '<3>{"time": ')])
def test_where_journald_reads_the_stream_lines_begin_with_a_severity(
    tmp_path: Path, options: tuple[str, ...], begin: str
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        found = os.fstat(theirs.fileno())
        run(tmp_path, *options, stream=theirs, journal=f"{found.st_dev}:{found.st_ino}")
        theirs.close()
        said = ours.recv(65536).decode()
        assert said.startswith(begin) and "another agent runs" in said


def test_a_stream_that_is_not_journald_s_has_none_whatever_the_environment_says(tmp_path: Path) -> None:
    found = os.stat("/dev/null")
    with (tmp_path / "log").open("wb") as log:
        run(tmp_path, stream=log, journal=f"{found.st_dev}:{found.st_ino}")
    assert (tmp_path / "log").read_text().startswith(f"ovsmesh: {tmp_path}/s/agent.lock: another agent runs")


def test_an_error_that_ends_an_agent_is_json_too(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        run(tmp_path, "--log-format", "json", stream=log, journal="")
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert json.loads(line)["level"] == "error" and "another agent runs" in json.loads(line)["message"]
