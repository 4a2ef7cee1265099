"""The history: bounded, read back whatever is in it, and never something that a reconcile waits for."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovsmesh import history as module
from ovsmesh.errors import OvsmeshError
from ovsmesh.history import Entry, Event, History, read
from ovsmesh.state_dir import HISTORY_FILES, StateDir

LIMIT = 1 << 20


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of tests may need more than two seconds for what `close` writes."""
    monkeypatch.setattr(module, "_LAST", 60.0)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[History]:
    history = History(tmp_path)
    yield history
    history.close()


def whats(folder: Path, since: float = 0.0) -> list[str]:
    return [entry.what for entry in read(folder, since)]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_an_entry_is_one_json_object_a_line(made: History, tmp_path: Path) -> None:
    made.add(Event.DRIFT, "route 10.97.2.0/24 was deleted by someone", "someone", 0.0123)
    made.add(Event.PROBLEM, "no disk")
    made.close()
    first, second = map(json.loads, (tmp_path / "history.jsonl").read_text().splitlines())
    assert list(first) == ["time", "event", "what", "who", "took"]
    assert first["time"].endswith("Z") and (first["event"], first["who"], first["took"]) == ("drift", "someone", 0.0123)
    assert second["who"] is None and second["took"] is None
    assert stat.S_IMODE((tmp_path / "history.jsonl").stat().st_mode) == 0o600


def test_it_survives_a_restart(made: History, tmp_path: Path) -> None:
    made.add(Event.START, "one")
    made.close()
    again = History(tmp_path)
    again.add(Event.START, "two")
    again.close()
    assert whats(tmp_path) == ["one", "two"] == [entry.what for entry in again.recent()]


def test_a_start_reads_as_many_lines_as_it_keeps_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, first in (("history.jsonl.1", 0), ("history.jsonl", 150)):
        found = (json.dumps(Entry(1.0, "change", str(n)).to_dict()) for n in range(first, first + 150))
        (tmp_path / name).write_text("\n".join(found) + "\n")
    parsed: list[bytes] = []
    parse = module._entry

    def counted(line: bytes) -> Entry | None:
        parsed.append(line)
        return parse(line)

    monkeypatch.setattr(module, "_entry", counted)
    history = History(tmp_path)
    assert [entry.what for entry in history.recent()] == [str(n) for n in range(100, 300)] and len(parsed) == 200
    history.close()


def test_a_line_that_a_power_cut_has_torn_is_skipped_and_spoils_no_other(made: History, tmp_path: Path) -> None:
    made.add(Event.START, "one")
    made.add(Event.STOP, "two")
    made.close()
    file = tmp_path / "history.jsonl"
    for torn in (file.read_bytes()[:-9], file.read_bytes()[:-60] + bytes(50)):
        file.write_bytes(torn)
        assert whats(tmp_path)[:1] == ["one"]
        after = History(tmp_path)
        after.add(Event.START, "three")
        after.close()
        assert whats(tmp_path)[-1] == "three" and "two" not in whats(tmp_path)


def test_it_is_bounded_and_keeps_the_newest(made: History, tmp_path: Path) -> None:
    for number in range(2500):
        made.add(Event.CHANGE, f"{number} " + "x" * 1000)
    made.close()
    kept = [int(what.split()[0]) for what in whats(tmp_path)]
    assert size(tmp_path) <= LIMIT and size(tmp_path) > LIMIT // 3
    assert kept == list(range(kept[0], 2500)) and len(kept) > 400
    assert [int(entry.what.split()[0]) for entry in made.recent()] == list(range(2300, 2500))


def test_one_entry_holds_the_parts_of_a_thousand_peers_and_no_more(made: History, tmp_path: Path) -> None:
    made.add(Event.CHANGE, "many", parts=(f"+ route 10.{n // 256}.{n % 256}.0/24" for n in range(4000)))
    made.add(Event.CHANGE, "too many", parts=("x" * 4000 for _ in range(100_000)))
    made.close()
    many, too_many = read(tmp_path)
    assert len(many.parts) == 4000 and 30 < len(too_many.parts) < 40
    assert not [entry for entry in made.recent() if entry.parts]


def test_a_file_that_something_else_has_made_too_long_is_bounded_again(tmp_path: Path) -> None:
    line = json.dumps(Entry(1.0, "change", "x" * 200).to_dict()) + "\n"
    (tmp_path / "history.jsonl").write_text(line * 20_000)
    assert 1000 < len(read(tmp_path)) < 20_000
    history = History(tmp_path)
    history.add(Event.START, "one")
    history.close()
    assert whats(tmp_path) == ["one"] and size(tmp_path) < LIMIT


@pytest.mark.parametrize("make", [lambda p: os.mkfifo(p), lambda p: p.mkdir(), lambda p: p.symlink_to("/etc/passwd")])
def test_what_is_no_regular_file_is_neither_read_nor_written(
    make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "history.jsonl")
    with pytest.raises(OvsmeshError, match=r"history\.jsonl: can't be read"):
        read(tmp_path)
    history = History(tmp_path)
    history.add(Event.START, "one")
    history.close()
    assert "history.jsonl can't be written" in caplog.text
    assert [entry.what for entry in history.recent()] == ["one"]


GARBAGE = [
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"time": 3, "event": "x", "what": "y"}',
    b'{"time": "yesterday", "event": "x", "what": "y"}',
    b'{"time": "9999-12-31T23:59:59-23:59", "event": "x", "what": "y"}',
    b'{"time": "2026-11-29T00:00:00Z", "event": ["x"], "what": "y"}',
    b'{"time": "2026-11-29T00:00:00Z", "event": "x"}',
    b"\0" * 64,
]


@pytest.mark.parametrize("line", GARBAGE)
def test_garbage_is_skipped(line: bytes, tmp_path: Path) -> None:
    good = json.dumps(Entry(1.0, "change", "good").to_dict()).encode()
    (tmp_path / "history.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    assert whats(tmp_path) == ["good", "good"]


_VALUES = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["2026-11-29T00:00:00.5+01:00", "0001-01-01", 1e400, float("nan"), 10**400, -1, None, True, ["a\n"]]
    ),
)
_KEYS = st.sampled_from(["time", "event", "what", "who", "took", "parts"])


@given(st.lists(st.dictionaries(_KEYS, _VALUES), max_size=5))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_line_holds_what_is_shown_is_printable_and_json(tmp_path: Path, found: list[Any]) -> None:
    lines = (json.dumps(each).encode("utf-8", "surrogatepass") for each in found)
    (tmp_path / "history.jsonl").write_bytes(b"\n".join(lines))
    for entry in read(tmp_path):
        assert all(text.isprintable() for text in (entry.text, entry.event, *entry.parts))
        json.dumps(entry.to_dict(), allow_nan=False)


def test_hostile_words_are_one_printable_line(made: History, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    made.add(Event.PROBLEM, "a\nb\x1b[31m\u202e\u2028" + "c" * 100_000, "\r\n<0>who")
    made.close()
    (entry,) = read(tmp_path)
    assert entry.what.startswith("a b [31m  ccc") and len(entry.what) < 5000 and entry.who == "  <0>who"
    assert caplog.messages[0].isprintable()


def test_since(tmp_path: Path) -> None:
    lines = (json.dumps(Entry(float(at), "change", str(at)).to_dict()) for at in (100, 200, 300))
    (tmp_path / "history.jsonl").write_text("\n".join(lines) + "\n")
    assert whats(tmp_path, 200.0) == ["200", "300"] and whats(tmp_path, 301.0) == []


def test_a_disk_that_stands_still_holds_nobody_up(
    made: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, go_on = threading.Event(), threading.Event()

    def stand_still(handle: int, data: bytes) -> int:
        stuck.set()
        assert go_on.wait(60)
        return write(handle, data)

    write = os.write
    monkeypatch.setattr("ovsmesh.history.os.write", stand_still)
    made.add(Event.START, "one")
    assert stuck.wait(60)
    for _ in range(5000):
        made.add(Event.START, "x" * 1000)
    assert made._waiting == sum(map(len, made._pending)) <= module._PENDING
    go_on.set()
    made.close()
    assert len(whats(tmp_path)) > 400


def test_a_full_disk_is_logged_once_and_is_not_the_end(
    made: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(module, "_AGAIN", 0.01)
    write, free, tried = os.write, [10], threading.Semaphore(0)

    def short(handle: int, data: bytes) -> int:
        tried.release()
        if free[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(handle, data[: free[0]])
        free[0] -= done if free[0] < 1000 else 0
        return done

    monkeypatch.setattr("ovsmesh.history.os.write", short)
    made.add(Event.START, "one")
    made.add(Event.CHANGE, "two")
    for _ in range(4):
        assert tried.acquire(timeout=60)
    assert (tmp_path / "history.jsonl").read_bytes() == b""
    free[0] = 1 << 20
    made.close()
    assert whats(tmp_path) == ["one", "two"]
    said = [message for message in caplog.messages if "history.jsonl" in message]
    assert len(said) == 2 and "No space left on device" in said[0] and "is written again" in said[1]


def test_a_fight_over_a_setting_is_told_a_few_times_and_then_counted(
    made: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("ovsmesh.history.time.monotonic", lambda: clock[0])
    for _ in range(100):
        made.add(Event.DRIFT, "x was deleted by someone", "someone", 0.01)
        made.add(Event.START, "again")
    made.add(Event.DRIFT, "y was deleted by someone", "someone", 0.01)
    clock[0] += 61
    made.add(Event.DRIFT, "x was deleted by someone", "someone", 0.01)
    monkeypatch.undo()
    made.close()
    drift = [entry for entry in read(tmp_path) if entry.event == "drift"]
    assert [entry.what for entry in drift] == [
        *["x was deleted by someone"] * 5,
        "y was deleted by someone",
        "x was deleted by someone; 95 times more within 1 min 1 s",
        "x was deleted by someone",
    ]
    assert len([what for what in whats(tmp_path) if what == "again"]) == 100
    assert len([message for message in caplog.messages if message.startswith("x was")]) == 7


def test_what_was_not_told_is_counted_when_the_agent_stops(made: History, tmp_path: Path) -> None:
    for _ in range(9):
        made.add(Event.PROBLEM, "no")
    made.close()
    assert whats(tmp_path)[-1].startswith("no; 4 times more within ")


def test_without_a_directory_only_the_last_entries_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    history = History()
    history.add(Event.STOP, "bye")
    history.close()
    assert [entry.what for entry in history.recent()] == ["bye"] == caplog.messages


TEXTS = [
    (Entry(0, "drift", "x was deleted by someone", "someone", 0.012), "x was deleted by someone; restored after 12 ms"),
    (Entry(0, "drift", "x was deleted by someone", "someone"), "x was deleted by someone; not restored yet"),
    (Entry(0, "change", "added x", "mesh file", 1.5), "added x (mesh file, 1.5 s)"),
    (Entry(0, "change", "added x"), "added x"),
    (Entry(0, "resolved", "no disk", "", 200.0), "resolved after 3 min 20 s: no disk"),
    (Entry(0, "reachable", "web2 is reachable again", "", 12.3), "web2 is reachable again after 12.3 s"),
    (Entry(0, "in-sync", "in sync", "", 7260.0), "in sync; degraded before for 2 h 1 min"),
]


@pytest.mark.parametrize(("entry", "text"), TEXTS)
def test_an_entry_in_words(entry: Entry, text: str) -> None:
    assert entry.text == text


def test_the_severity_is_the_event_s_or_the_one_that_is_given(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    history = History()
    history.add(Event.DRIFT, "a")
    history.add(Event.CHANGE, "b")
    history.add(Event.PROBLEM, "c", level=logging.ERROR)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "ERROR"]


def test_cleanup_removes_it_with_the_state_directory(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    state.ensure()
    for name in HISTORY_FILES:
        (state.path / name).write_text("{}\n")
    assert state.remove() == [] and not state.path.exists()
