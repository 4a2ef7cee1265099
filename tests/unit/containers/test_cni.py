"""The CNI driver on real files, with real processes that answer as plugins do."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ovsmesh.containers.cni import Cni
from ovsmesh.dataplane.cni_config import FILE, PLUGINS
from ovsmesh.dataplane.plan import Step
from ovsmesh.errors import OvsmeshError
from tests.support.filetext import silent, wakes

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
def cni(net: Path, bins: Path) -> Iterator[Cni]:
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
    # not in the directory, where it would be an event
    asked = directory.parent / f"{name}.asked"
    body = f"[ \"$CNI_COMMAND\" = VERSION ] || exit 1\ncat >/dev/null\necho >>{asked}\necho '{said}'"
    return script(directory, name, body)


def versions(cni: Cni, name: str = "bridge") -> tuple[tuple[str, ...], str]:
    facts = cni.facts()
    assert facts is not None
    return next((p.versions, p.why) for p in facts.plugins if p.name == name)


# the plugins


def test_each_plugin_is_asked_once_for_as_long_as_it_is_the_same(cni: Cni, bins: Path) -> None:
    assert versions(cni) == (DEBIAN, "")
    assert cni.facts() == cni.facts()
    assert (bins.parent / "bridge.asked").read_text() == "\n"
    plugin(bins, "bridge", "0.3.1")
    assert versions(cni) == (("0.3.1",), "")


def test_a_plugin_that_comes_is_an_event(cni: Cni, bins: Path) -> None:
    (bins / "portmap").unlink()
    assert wakes(cni)  # type: ignore[arg-type]
    assert versions(cni, "portmap") == ((), f"not in {bins}")
    plugin(bins, "portmap", "1.0.0")
    assert wakes(cni)  # type: ignore[arg-type]
    assert versions(cni, "portmap") == (("1.0.0",), "")


def test_all_copies_count(net: Path, bins: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    plugin(other, "bridge", "0.4.0", "1.0.0", "1.1.0")
    script(other, "host-local", "exit 1")
    cni = Cni(str(net), f"{bins}:/nowhere::{other}")
    assert versions(cni) == (("0.4.0", "1.0.0"), "")
    assert versions(cni, "host-local") == (DEBIAN, ""), "one that works is enough"
    cni.close()


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
def test_a_plugin_that_does_not_answer_is_named(cni: Cni, bins: Path, body: str, says: str) -> None:
    script(bins, "bridge", body)
    found, why = versions(cni)
    assert found == () and says in why and f"{bins}/bridge" in why and len(why) < 400


def test_a_plugin_that_hangs_is_not_waited_for(cni: Cni, bins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovsmesh.containers.cni._TIMEOUT", 0.2)
    script(bins, "bridge", "exec sleep 60")
    start = time.monotonic()
    assert "did not answer VERSION within 0.2 s" in versions(cni)[1]
    cni.facts()
    assert time.monotonic() - start < 10


def test_a_file_that_is_no_program_is_named(cni: Cni, bins: Path) -> None:
    (bins / "bridge").chmod(0o644)
    (bins / "host-local").unlink()
    (bins / "host-local").mkdir()
    (bins / "portmap").write_bytes(b"\x7fELF, but not really")
    assert "not an executable file" in versions(cni)[1]
    assert "not an executable file" in versions(cni, "host-local")[1]
    assert "can't be run here" in versions(cni, "portmap")[1]
    assert versions(cni, "loopback") == (DEBIAN, "")


def test_missing_plugins_are_a_problem_only_where_a_conflist_is_wanted(cni: Cni, bins: Path) -> None:
    (bins / "bridge").unlink()
    assert cni.observe() == ({}, [], [])
    assert cni.facts() is not None
    assert [p.reason for p in cni.observe()[2]] == ["CNIPluginsMissing"]


def test_the_conflist_is_kept_while_plugins_are_missing(cni: Cni, net: Path, bins: Path) -> None:
    (net / FILE).write_text(TEXT)
    assert cni.facts().kept == ""  # type: ignore[union-attr]
    plugin(bins, "bridge", "0.1.0")
    assert cni.facts().kept == TEXT  # type: ignore[union-attr]
    (bins / "bridge").unlink()
    assert cni.facts().kept == TEXT  # type: ignore[union-attr]


# the file


def test_written_read_back_and_removed(cni: Cni, net: Path) -> None:
    cni.apply([WRITE])
    assert (net / FILE).read_text() == TEXT and stat.S_IMODE((net / FILE).stat().st_mode) == 0o644
    assert [p.name for p in net.iterdir()] == [FILE]
    assert cni.observe()[0] == {FILE: TEXT}
    cni.apply([REMOVE])
    assert list(net.iterdir()) == [] and cni.observe()[0] == {}
    cni.apply([REMOVE])


CHAINED = TEXT.replace('{"type": "bridge"}', '{"type": "bridge"}, {"type": "istio-cni"}')


def test_a_plugin_that_others_put_in_is_asked_and_named_where_it_is_missing(cni: Cni, net: Path, bins: Path) -> None:
    (net / FILE).write_text(CHAINED.replace('{"type": "istio-cni"}', '{"type": "istio-cni"}, {"type": "../../bin/sh"}'))
    plugin(bins, "istio-cni", "0.4.0", "1.0.0")
    facts = cni.facts()
    assert facts is not None
    first, second = facts.chained.plugins
    assert (first.versions, first.why) == (("0.4.0", "1.0.0"), "") and second.why == "is no plugin's name"
    script(bins, "istio-cni", "exit 1")
    assert cni.facts().chained.plugins[0].why == "", "not all can answer"  # type: ignore[union-attr]
    (bins / "istio-cni").unlink()
    assert cni.facts().chained.plugins[0].why == f"not in {bins}"  # type: ignore[union-attr]
    assert {p.reason for p in cni.observe()[2]} == {"CNIPluginMissing"}


def test_a_plugin_that_others_put_in_meanwhile_is_not_lost(cni: Cni, net: Path) -> None:
    """Between the look at the file and the write of it."""
    (net / FILE).write_text(TEXT.replace("1.0.0", "0.4.0"))
    cni.facts()
    (net / FILE).write_text(CHAINED)
    cni.apply([WRITE])
    assert (net / FILE).read_text() == CHAINED
    cni.facts()
    cni.apply([Step("~", "cni", FILE, CHAINED.replace("1.0.0", "1.1.0"), CHAINED)])
    assert "1.1.0" in (net / FILE).read_text()


def test_removed_are_the_managed_plugins_only(cni: Cni, net: Path) -> None:
    (net / FILE).write_text(CHAINED)
    cni.apply([REMOVE])
    assert json.loads((net / FILE).read_text())["plugins"] == [{"type": "istio-cni"}]
    managed, (unmanaged,), _ = cni.observe()
    assert not managed and "only istio-cni" in unmanaged.detail
    cni.apply([REMOVE])
    assert (net / FILE).exists()


@pytest.mark.parametrize("undo", [Path.unlink, lambda path: path.rename(path.with_name(f"{FILE}.cilium_bak"))])
def test_a_fight_is_named_and_slows_down(
    cni: Cni, net: Path, monkeypatch: pytest.MonkeyPatch, undo: Callable[[Path], object]
) -> None:
    now, writes = 1000.0, []
    monkeypatch.setattr("ovsmesh.containers.cni.time", SimpleNamespace(monotonic=lambda: now))
    cni.facts()
    cni.apply([WRITE])
    # a loop that does what the agent does, against a program that undoes each write at once
    while now < 1600.0:
        if (net / FILE).exists():
            undo(net / FILE)
        fatal = {p.reason for p in cni.observe()[2] if p.fatal}
        if not fatal:
            cni.apply([WRITE])
            writes.append(now)
            assert cni.drain() is (len(writes) < 6), "in a pause its changes wake nobody"
        else:
            assert fatal == {"CNIContested"}
            now += 0.1
    assert 6 <= len(writes) <= 30 and len([at for at in writes if at > 1300]) <= 12
    (problem,) = (p for p in cni.observe()[2] if p.reason == "CNIContested")
    assert f"{net}/{FILE}" in str(problem) and "another program" in str(problem)
    # it ends, and so does what is said about it
    now += 60.0
    assert not any(p.fatal for p in cni.observe()[2])
    now += 300.0
    assert "CNIContested" not in {p.reason for p in cni.observe()[2]}


def test_what_the_agent_itself_changes_is_no_fight(cni: Cni, net: Path) -> None:
    cni.facts()
    for number in range(20):
        cni.apply([Step("~", "cni", FILE, TEXT.replace("1.0.0", f"1.0.{number}"), None)])
    assert not cni.observe()[2]


def test_a_directory_that_is_not_there_is_made(tmp_path: Path, bins: Path) -> None:
    cni = Cni(str(tmp_path / "a" / "b"), str(bins))
    assert cni.observe() == ({}, [], [])
    cni.apply([WRITE])
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o755
    cni.drain()
    (tmp_path / "a" / "b" / FILE).unlink()
    assert wakes(cni)  # type: ignore[arg-type]
    cni.close()


def test_a_directory_behind_a_link_is_the_runtime_s_too(tmp_path: Path, net: Path, bins: Path) -> None:
    (tmp_path / "link").symlink_to(net)
    cni = Cni(str(tmp_path / "link"), str(bins))
    cni.apply([WRITE])
    assert cni.observe()[0] == {FILE: TEXT} and (net / FILE).exists()
    cni.close()


@pytest.mark.parametrize("hold", ["file", "dangling"])
def test_what_is_no_directory_is_said(tmp_path: Path, bins: Path, hold: str) -> None:
    path = tmp_path / "x"
    path.write_text("") if hold == "file" else path.symlink_to("nowhere")
    cni = Cni(str(path), str(bins))
    assert hold == "dangling" or [p.reason for p in cni.observe()[2]] == ["CNIUnreadable"]
    with pytest.raises(OvsmeshError, match="can't be written"):
        cni.apply([WRITE])
    cni.close()


def test_another_network_is_not_removed(cni: Cni, net: Path) -> None:
    (net / FILE).write_text('{"name": "theirs", "plugins": [{"type": "x"}]}')
    cni.apply([REMOVE])
    assert (net / FILE).exists()


def test_a_link_in_place_of_the_conflist_is_not_followed(cni: Cni, net: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(TEXT)
    (net / FILE).symlink_to(tmp_path / "elsewhere")
    managed, (unmanaged,), _ = cni.observe()
    assert not managed and "symbolic link" in unmanaged.detail


def test_no_writer_is_waited_for_and_nothing_large_is_read(cni: Cni, net: Path) -> None:
    os.mkfifo(net / FILE)
    os.mkfifo(net / "00.conf")
    (net / "01.conf").write_bytes(b" " * (2 << 20))
    (net / "02.conf").symlink_to("nowhere")
    (net / "03.conf").mkdir()
    (net / "04.conf").symlink_to(net)
    assert cni.facts() is not None
    _, (unmanaged,), said = cni.observe()
    assert "FIFO" in unmanaged.detail
    told = " ".join(map(str, said))
    assert all(text in told for text in ("00.conf", "FIFO", "01.conf", "02.conf", "04.conf", "a directory"))
    assert "03.conf" not in told, "a runtime ignores directories"


def test_a_name_that_is_not_text(cni: Cni, net: Path) -> None:
    (net / os.fsdecode(b"00\xff.conf")).write_text("{}")
    assert cni.facts() is not None
    (problem,) = cni.observe()[2]
    str(problem).encode()


def test_left_alone(tmp_path: Path) -> None:
    cni = Cni()
    assert cni.facts() is None and cni.observe() == ({}, [], []) and cni.fds() == [] and not cni.drain()
    cni.close()


# events


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
def test_a_change_of_the_directory_is_an_event(cni: Cni, net: Path, does: Callable[[Path], object]) -> None:
    (net / "other").write_text("{}")
    cni.apply([WRITE])
    while not silent(cni):  # type: ignore[arg-type]
        pass
    does(net)
    assert wakes(cni)  # type: ignore[arg-type]


def test_reading_is_no_event(cni: Cni, net: Path) -> None:
    cni.apply([WRITE])
    while not silent(cni):  # type: ignore[arg-type]
        pass
    cni.facts()
    cni.observe()
    assert silent(cni)  # type: ignore[arg-type]
