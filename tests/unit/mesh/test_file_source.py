"""The file source: never a mesh that is not whole, and the last good one for as long as it takes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ovsmesh.mesh import file_source, last_good
from ovsmesh.mesh.file_source import FileSource
from ovsmesh.mesh.manifest import parse
from ovsmesh.state_dir import StateDir
from tests.support.filetext import HEAD, by_rename, members, silent, text_of, wakes

BAD = "kind: [\n"


@pytest.fixture
def mesh(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "mesh.yaml"
    path.parent.mkdir()
    path.write_text(text_of("a", "b"))
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    StateDir(tmp_path / "state").ensure()
    return tmp_path / "state"


@pytest.fixture
def source(mesh: Path, state: Path) -> Iterator[FileSource]:
    made = FileSource(mesh, state, "a")
    yield made
    made.close()


# ---------------------------------------------------------------- half-written files


def test_a_file_in_the_middle_of_being_written_is_not_read(source: FileSource, mesh: Path) -> None:
    before = source.snapshot()
    text = text_of("a", "b", "c")
    with open(mesh, "w") as file:
        file.write(text[: text.index("  - {name: b")])
        file.flush()
        assert silent(source)
        assert source.snapshot() is before
        file.write(text[text.index("  - {name: b") :])
    assert wakes(source)
    assert members(source.snapshot()) == "abc"


def test_a_writer_who_never_closes(source: FileSource, mesh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source.snapshot()
    with open(mesh, "w") as file:
        file.write("kind: ")
        file.flush()
        assert source.snapshot() is before
        monkeypatch.setattr(file_source, "WRITE_GRACE", 0.0)
        snapshot = source.snapshot()
    assert snapshot.mesh is before.mesh and snapshot.problems[0].reason == "MeshFileInvalid"


# ---------------------------------------------------------------- what is not whole


def nothing(path: Path) -> None:
    path.write_text("")


def truncated(path: Path) -> None:
    path.write_text(text_of("a", "b")[:-9])


def invalid(path: Path) -> None:
    path.write_text(BAD)


def unknown_key(path: Path) -> None:
    path.write_text(text_of("a", "b").replace("clusterCIDRs", "clusterCIDR"))


def empty(path: Path) -> None:
    path.write_text(text_of())


def no_nodes(path: Path) -> None:
    path.write_text(HEAD)


def self_missing(path: Path) -> None:
    path.write_text(text_of("b", "c"))


def deleted(path: Path) -> None:
    path.unlink()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with open(path, "w") as file:
        file.truncate(1 << 40)


SPOILT: dict[Callable[[Path], None], tuple[str, str]] = {
    nothing: ("MeshFileInvalid", "0 bytes"),
    truncated: ("MeshFileInvalid", "cut off"),
    invalid: ("MeshFileInvalid", "mesh.yaml:2:1"),
    unknown_key: ("MeshFileInvalid", "did you mean clusterCIDRs?"),
    empty: ("MeshFileEmpty", "spec.nodes is empty"),
    no_nodes: ("MeshFileEmpty", "spec.nodes is empty"),
    self_missing: ("SelfMissing", "this node, a"),
    deleted: ("MeshFileUnreadable", "No such file"),
    directory: ("MeshFileUnreadable", "is a directory"),
    fifo: ("MeshFileUnreadable", "is a FIFO"),
    dangling: ("MeshFileUnreadable", "No such file"),
    device: ("MeshFileUnreadable", "is a character device"),
    huge: ("MeshFileUnreadable", "1099511627776 bytes"),
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda s: s.__name__)
def test_the_last_good_mesh_is_kept(source: FileSource, mesh: Path, state: Path, spoil: Callable[[Path], None]) -> None:
    reason, part = SPOILT[spoil]
    good = source.snapshot()
    assert source.commit() == ()
    saved = (state / "mesh.json").read_bytes()
    spoil(mesh)
    assert wakes(source)
    kept = source.snapshot()
    assert kept.mesh is good.mesh and not kept.confirmed and kept.since == good.since
    (problem,) = kept.problems
    assert problem.reason == reason and problem.fatal
    for wanted in (str(mesh), part, "Keeping the last good mesh, of 20", "(2 nodes)"):
        assert wanted in problem.message
    assert source.snapshot() is kept
    assert source.commit() == () and (state / "mesh.json").read_bytes() == saved
    # After a restart the same, out of the state directory.
    again = FileSource(mesh, state, "a")
    restarted = again.snapshot()
    assert restarted.mesh == good.mesh and not restarted.confirmed and restarted.problems[0].reason == reason
    again.close()
    # And without a past there is no mesh.
    fresh = FileSource(mesh, state / "none", "a")
    assert fresh.snapshot().mesh is None and "nothing is touched" in fresh.snapshot().problems[0].message
    fresh.close()
    # Repaired: as if nothing had happened.
    if mesh.is_dir():
        mesh.rmdir()
    else:
        mesh.unlink(missing_ok=True)
    mesh.write_text(text_of("a", "b"))
    assert wakes(source)
    repaired = source.snapshot()
    assert repaired.mesh is good.mesh and repaired.confirmed and repaired.problems == ()


def test_unreadable(source: FileSource, mesh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads what mode 0 forbids, so the refusal itself is played; the event for it is real."""
    good = source.snapshot()
    mesh.chmod(0)
    assert wakes(source)

    def refuse(path: object, limit: int = 0) -> tuple[bytes, os.stat_result]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(file_source, "read_regular", refuse)
        kept = source.snapshot()
    assert kept.mesh is good.mesh and kept.problems[0].reason == "MeshFileUnreadable"
    assert "Permission denied" in kept.problems[0].message
    mesh.chmod(0o600)
    assert wakes(source)
    assert source.snapshot().problems == ()


def test_others_bad_entries_do_not_stop_this_node(source: FileSource, mesh: Path) -> None:
    source.snapshot()
    mesh.write_text(
        text_of("a", "b", "c").replace("10.1.98.0/24", "10.1.98.1/24").replace("10.1.99.0/24", "10.1.9.9/24")
    )
    assert wakes(source)
    snapshot = source.snapshot()
    assert members(snapshot) == "ab" and snapshot.confirmed
    assert [(p.node, p.field, p.value, p.fatal) for p in snapshot.problems] == [
        ("b", "podCIDRs[0]", "10.1.98.1/24", False),
        ("c", "podCIDRs[0]", "10.1.9.9/24", False),
    ]


def test_own_bad_entry(source: FileSource, mesh: Path, state: Path) -> None:
    bad = text_of("a", "b", "c").replace("10.1.97.0/24", "10.1.97.1/24")
    good = source.snapshot()
    mesh.write_text(bad)
    snapshot = source.snapshot()
    assert members(snapshot) == "abc" and snapshot.problems[0].fatal and snapshot.mesh != good.mesh
    fresh = FileSource(mesh, state / "none", "a")
    snapshot = fresh.snapshot()
    assert snapshot.mesh is None
    assert [p.reason for p in snapshot.problems] == ["SelfMissing", "PodCIDRInvalid"]
    fresh.close()


# ---------------------------------------------------------------- the last good mesh on disk


def test_only_commit_writes_and_only_when_changed(source: FileSource, mesh: Path, state: Path) -> None:
    assert source.commit() == ()
    source.snapshot()
    assert os.listdir(state) == []
    source.commit()
    saved = state / "mesh.json"
    assert saved.stat().st_mode & 0o777 == 0o600
    stamp = saved.stat().st_ino
    mesh.write_text("# a comment\n" + text_of("b", "a"))
    assert wakes(source)
    source.snapshot()
    source.commit()
    assert saved.stat().st_ino == stamp
    by_rename(mesh)
    source.snapshot()
    source.commit()
    assert saved.stat().st_ino != stamp
    assert parse(saved.read_bytes(), "saved")[0] == source.snapshot().mesh


def test_a_restart_knows_who_was_first(source: FileSource, mesh: Path, state: Path) -> None:
    source.snapshot()
    source.commit()
    thief = "  - {name: t, address: 192.0.2.200, podCIDRs: [10.1.98.0/24]}\n"
    mesh.write_text(text_of("a", "b").replace("  - {name: b", thief + "  - {name: b"))
    again = FileSource(mesh, state, "a")
    snapshot = again.snapshot()
    assert members(snapshot) == "ab" and snapshot.problems[0].node == "t"
    again.close()


@pytest.mark.parametrize("garbage", [b"", b"\xff", b"{", b"[]", b'{"kind": "Mesh"}', b"\0" * 99])
def test_garbage_in_the_last_good_mesh(mesh: Path, state: Path, garbage: bytes) -> None:
    (state / "mesh.json").write_bytes(garbage)
    source = FileSource(mesh, state, "a")
    snapshot = source.snapshot()
    assert members(snapshot) == "ab" and snapshot.confirmed
    (problem,) = snapshot.problems
    assert problem.reason == "LastGoodUnreadable" and not problem.fatal and "mesh.json" in problem.message
    assert source.commit() == () and source.snapshot().problems == ()
    source.close()
    (state / "mesh.json").write_bytes(garbage)
    mesh.write_text(BAD)
    source = FileSource(mesh, state, "a")
    assert source.snapshot().mesh is None
    source.close()


def test_the_last_good_mesh_of_another_node_is_not_used(source: FileSource, mesh: Path, state: Path) -> None:
    source.snapshot()
    source.commit()
    mesh.write_text(BAD)
    other = FileSource(mesh, state, "z")
    snapshot = other.snapshot()
    assert snapshot.mesh is None and "no node z" in snapshot.problems[1].message
    other.close()


def test_where_it_cannot_be_saved(source: FileSource, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def full(path: Path, data: str) -> None:
        tries.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    source.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(last_good, "write_atomic", full)
        (problem,) = source.commit()
        source.commit()
    assert problem.reason == "StateUnwritable" and not problem.fatal and "No space left" in problem.message
    assert len(tries) == 1
    assert source.snapshot().problems == (problem,) and source.snapshot().confirmed
    monkeypatch.setattr(source._last, "_save_after", 0.0)
    assert source.commit() == () and source.snapshot().problems == ()
