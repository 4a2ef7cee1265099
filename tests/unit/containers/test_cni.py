"""The room of the CNI directory: what it makes of real files and real processes that answer as plugins do."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ovsmesh.containers.cni import Cni
from ovsmesh.dataplane.cni_config import FILE, PLUGINS
from ovsmesh.dataplane.plan import Step
from ovsmesh.errors import OvsmeshError
from tests.support.filetext import rings, silent

TEXT = '{"name": "ovsmesh", "cniVersion": "1.0.0", "plugins": [{"type": "bridge"}]}\n'
WRITE, REMOVE = Step("+", "cni", FILE, TEXT, None), Step("-", "cni", FILE, None, TEXT)
DEBIAN = ("0.3.1", "0.4.0", "1.0.0")


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.d"
    path.mkdir()
    return path


@pytest.fixture
def bins(tmp_path: Path) -> Path:
    path = tmp_path / "bin"
    path.mkdir()
    for name in PLUGINS:
        plugin(path, name, *DEBIAN)
    return path


@pytest.fixture
def room(net: Path, bins: Path) -> Iterator[Cni]:
    made = Cni(str(net), str(bins))
    yield made
    made.close()


def script(directory: Path, name: str, body: str) -> Path:
    """An executable; made beside its place, as a file that is open for writing can't be run."""
    new = directory / f".{name}"
    new.write_text(f"#!/bin/sh\n{body}\n")
    new.chmod(0o755)
    new.rename(directory / name)
    return directory / name


def plugin(directory: Path, name: str, *versions: str) -> Path:
    """A plugin that answers VERSION as the specification says, and counts how often it was asked."""
    said = json.dumps({"cniVersion": "1.0.0", "supportedVersions": versions})
    # not in the directory, whose bell it would ring
    asked = directory.parent / f"{name}.asked"
    body = f"[ \"$CNI_COMMAND\" = VERSION ] || exit 1\ncat >/dev/null\necho >>{asked}\necho '{said}'"
    return script(directory, name, body)


def versions(room: Cni, name: str = "bridge") -> tuple[tuple[str, ...], str]:
    facts = room.facts()
    assert facts is not None
    return next((p.versions, p.why) for p in facts.plugins if p.name == name)


# the plugins


def test_each_plugin_is_asked_once_for_as_long_as_it_is_the_same(room: Cni, bins: Path) -> None:
    assert versions(room) == (DEBIAN, "")
    assert room.facts() == room.facts()
    assert (bins.parent / "bridge.asked").read_text() == "\n"
    plugin(bins, "bridge", "0.3.1")
    assert versions(room) == (("0.3.1",), "")


def test_a_plugin_that_comes_rings(room: Cni, bins: Path) -> None:
    (bins / "portmap").unlink()
    assert rings(room)  # type: ignore[arg-type]
    assert versions(room, "portmap") == ((), f"not in {bins}")
    plugin(bins, "portmap", "1.0.0")
    assert rings(room)  # type: ignore[arg-type]
    assert versions(room, "portmap") == (("1.0.0",), "")


def test_all_copies_count(net: Path, bins: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    plugin(other, "bridge", "0.4.0", "1.0.0", "1.1.0")
    script(other, "host-local", "exit 1")
    room = Cni(str(net), f"{bins}:/nowhere::{other}")
    assert versions(room) == (("0.4.0", "1.0.0"), "")
    assert versions(room, "host-local") == (DEBIAN, ""), "one that works is enough"
    room.close()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("exit 3", "gave no answer to VERSION (exit 3): no output"),
        ("echo no such thing >&2; exit 1", "no such thing"),
        ("echo '[]'", "gave no answer"),
        ("echo '{\"supportedVersions\": 7}'", "gave no answer"),
        ("echo '{\"supportedVersions\": []}'", "supports no version"),
        ("yes | head -c 100000", "gave no answer"),
    ],
)
def test_a_plugin_that_does_not_answer_is_named(room: Cni, bins: Path, body: str, says: str) -> None:
    script(bins, "bridge", body)
    found, why = versions(room)
    assert found == () and says in why and f"{bins}/bridge" in why and len(why) < 400


def test_a_plugin_that_hangs_is_left(room: Cni, bins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovsmesh.containers.cni._TIMEOUT", 0.2)
    script(bins, "bridge", "exec sleep 60")
    start = time.monotonic()
    assert "did not answer VERSION within 0.2 s" in versions(room)[1]
    room.facts()
    assert time.monotonic() - start < 10


def test_what_is_no_program(room: Cni, bins: Path) -> None:
    (bins / "bridge").chmod(0o644)
    (bins / "host-local").unlink()
    (bins / "host-local").mkdir()
    (bins / "portmap").write_bytes(b"\x7fELF, but not really")
    assert "not an executable file" in versions(room)[1]
    assert "not an executable file" in versions(room, "host-local")[1]
    assert "can't be run here" in versions(room, "portmap")[1]
    assert versions(room, "loopback") == (DEBIAN, "")


def test_what_lacks_is_a_problem_of_who_wants_a_conflist_only(room: Cni, bins: Path) -> None:
    (bins / "bridge").unlink()
    assert room.observe() == ({}, [], [])
    assert room.facts() is not None
    assert [p.reason for p in room.observe()[2]] == ["CNIPluginsMissing"]


def test_ours_is_kept_while_plugins_lack(room: Cni, net: Path, bins: Path) -> None:
    (net / FILE).write_text(TEXT)
    assert room.facts().kept == ""  # type: ignore[union-attr]
    plugin(bins, "bridge", "0.1.0")
    assert room.facts().kept == TEXT  # type: ignore[union-attr]
    (bins / "bridge").unlink()
    assert room.facts().kept == TEXT  # type: ignore[union-attr]


# the file


def test_written_read_back_and_removed(room: Cni, net: Path) -> None:
    room.apply([WRITE])
    assert (net / FILE).read_text() == TEXT and stat.S_IMODE((net / FILE).stat().st_mode) == 0o644
    assert [p.name for p in net.iterdir()] == [FILE]
    assert room.observe()[0] == {FILE: TEXT}
    room.apply([REMOVE])
    assert list(net.iterdir()) == [] and room.observe()[0] == {}
    room.apply([REMOVE])


def test_a_directory_that_is_not_there_is_made(tmp_path: Path, bins: Path) -> None:
    room = Cni(str(tmp_path / "a" / "b"), str(bins))
    assert room.observe() == ({}, [], [])
    room.apply([WRITE])
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o755
    room.drain()
    (tmp_path / "a" / "b" / FILE).unlink()
    assert rings(room)  # type: ignore[arg-type]
    room.close()


def test_a_directory_behind_a_link_is_the_runtime_s_too(tmp_path: Path, net: Path, bins: Path) -> None:
    (tmp_path / "link").symlink_to(net)
    room = Cni(str(tmp_path / "link"), str(bins))
    room.apply([WRITE])
    assert room.observe()[0] == {FILE: TEXT} and (net / FILE).exists()
    room.close()


@pytest.mark.parametrize("hold", ["file", "dangling"])
def test_what_is_no_directory_is_said(tmp_path: Path, bins: Path, hold: str) -> None:
    path = tmp_path / "x"
    path.write_text("") if hold == "file" else path.symlink_to("nowhere")
    room = Cni(str(path), str(bins))
    assert hold == "dangling" or [p.reason for p in room.observe()[2]] == ["CNIUnreadable"]
    with pytest.raises(OvsmeshError, match="can't be written"):
        room.apply([WRITE])
    room.close()


def test_another_network_is_not_removed(room: Cni, net: Path) -> None:
    (net / FILE).write_text('{"name": "theirs", "plugins": [{"type": "x"}]}')
    room.apply([REMOVE])
    assert (net / FILE).exists()


def test_what_is_at_our_name_is_never_followed(room: Cni, net: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(TEXT)
    (net / FILE).symlink_to(tmp_path / "elsewhere")
    ours, (unmanaged,), _ = room.observe()
    assert not ours and "symbolic link" in unmanaged.detail


def test_nobody_is_waited_for_and_nothing_large_is_read(room: Cni, net: Path) -> None:
    os.mkfifo(net / FILE)
    os.mkfifo(net / "00.conf")
    (net / "01.conf").write_bytes(b" " * (2 << 20))
    (net / "02.conf").symlink_to("nowhere")
    (net / "03.conf").mkdir()
    (net / "04.conf").symlink_to(net)
    assert room.facts() is not None
    _, (unmanaged,), said = room.observe()
    assert "FIFO" in unmanaged.detail
    told = " ".join(map(str, said))
    assert all(text in told for text in ("00.conf", "FIFO", "01.conf", "02.conf", "04.conf", "a directory"))
    assert "03.conf" not in told, "a runtime passes over directories"


def test_a_name_that_is_no_text(room: Cni, net: Path) -> None:
    (net / os.fsdecode(b"00\xff.conf")).write_text("{}")
    assert room.facts() is not None
    (problem,) = room.observe()[2]
    str(problem).encode()


def test_left_alone(tmp_path: Path) -> None:
    room = Cni()
    assert room.facts() is None and room.observe() == ({}, [], []) and room.fds() == [] and not room.drain()
    room.close()


# the bell


@pytest.mark.parametrize(
    "does",
    [
        lambda net: (net / FILE).unlink(),
        lambda net: (net / FILE).write_text(""),
        lambda net: (net / "00.conf").write_text("{}"),
        lambda net: (net / FILE).rename(net / "x"),
        lambda net: os.replace(net / "other", net / FILE),
        lambda net: net.rename(net.parent / "gone"),
    ],
)
def test_a_change_of_the_directory_rings(room: Cni, net: Path, does: Callable[[Path], object]) -> None:
    (net / "other").write_text("{}")
    room.apply([WRITE])
    while not silent(room):  # type: ignore[arg-type]
        pass
    does(net)
    assert rings(room)  # type: ignore[arg-type]


def test_reading_rings_not(room: Cni, net: Path) -> None:
    room.apply([WRITE])
    while not silent(room):  # type: ignore[arg-type]
        pass
    room.facts()
    room.observe()
    assert silent(room)  # type: ignore[arg-type]
