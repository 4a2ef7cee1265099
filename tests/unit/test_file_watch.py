"""A file watch: each way in which a file can change is an event, again and again, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ovsmesh.file_watch import FileWatch
from ovsmesh.mesh.file_source import FileSource
from ovsmesh.state_dir import StateDir
from tests.support.filetext import by_rename, members, silent, text_of, wakes


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


def in_place(path: Path) -> None:
    path.write_text(text_of("a", "b", "c"))


def deleted_and_made(path: Path) -> None:
    path.unlink()
    path.write_text(text_of("a", "b", "c"))


def by_hard_link(path: Path) -> None:
    new = path.with_name("new")
    new.write_text(text_of("a", "b", "c"))
    path.unlink()
    path.hardlink_to(new)


def by_symlink(path: Path) -> None:
    other = path.parent.parent / "elsewhere.yaml"
    other.write_text(text_of("a", "b", "c"))
    new = path.with_name("new")
    new.symlink_to(other)
    new.rename(path)


def whole_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("old"))
    path.parent.mkdir()
    path.write_text(text_of("a", "b", "c"))


CHANGES: list[Callable[[Path], None]] = [
    by_rename,
    in_place,
    deleted_and_made,
    by_hard_link,
    by_symlink,
    whole_directory,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_each_way_to_change_is_an_event_again_and_again(
    source: FileSource, mesh: Path, change: Callable[[Path], None]
) -> None:
    first = source.snapshot()
    assert members(first) == "ab" and first.confirmed and first.problems == ()
    assert silent(source)
    fds = source.fds()
    change(mesh)
    assert wakes(source)
    assert members(source.snapshot()) == "abc"
    # what came in that way is watched too
    mesh.write_text(text_of("a"))
    assert wakes(source)
    assert members(source.snapshot()) == "a"
    by_rename(mesh)
    assert wakes(source)
    assert members(source.snapshot()) == "abc"
    source.drain()
    assert silent(source) and source.fds() == fds


def test_config_map(tmp_path: Path, state: Path) -> None:
    """As the kubelet does it: mesh.yaml → ..data/mesh.yaml, ..data → a dated directory, ..data is swapped."""
    volume = tmp_path / "volume"

    def publish(stamp: str, text: str) -> None:
        (volume / stamp).mkdir(parents=True)
        (volume / stamp / "mesh.yaml").write_text(text)
        (volume / "..data_tmp").symlink_to(stamp)
        (volume / "..data_tmp").rename(volume / "..data")

    publish("..2026_1", text_of("a"))
    (volume / "mesh.yaml").symlink_to("..data/mesh.yaml")
    source = FileSource(volume / "mesh.yaml", state, "a")
    assert members(source.snapshot()) == "a"
    for number, names in enumerate(["ab", "abc", "ac"], 2):
        publish(f"..2026_{number}", text_of(*names))
        assert wakes(source)
        assert members(source.snapshot()) == names
    source.close()


def test_the_directory_comes_later(tmp_path: Path, state: Path) -> None:
    path = tmp_path / "one" / "two" / "mesh.yaml"
    source = FileSource(path, state, "a")
    snapshot = source.snapshot()
    assert snapshot.mesh is None and snapshot.problems[0].reason == "MeshFileUnreadable"
    assert str(path) in snapshot.problems[0].message and "nothing is touched" in snapshot.problems[0].message
    path.parent.parent.mkdir()
    assert wakes(source)
    path.parent.mkdir()
    assert wakes(source)
    path.write_text(text_of("a"))
    assert wakes(source)
    assert members(source.snapshot()) == "a"
    source.close()


def test_a_dangling_link_that_is_repaired(tmp_path: Path, state: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "mesh.yaml").symlink_to("far/../far/real.yaml")
    source = FileSource(tmp_path / "mesh.yaml", state, "a")
    assert source.snapshot().problems[0].reason == "MeshFileUnreadable"
    (tmp_path / "far" / "real.yaml").write_text(text_of("a"))
    assert wakes(source)
    assert members(source.snapshot()) == "a"
    source.close()


def test_neighbours_are_no_event(source: FileSource, mesh: Path) -> None:
    source.snapshot()
    (mesh.parent / "log").write_text("x")
    (mesh.parent / "mesh.yaml.swp").write_text("x")
    mesh.read_text()
    assert silent(source)


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("y")
    (tmp_path / "y").symlink_to("x")
    watch = FileWatch(tmp_path / "x")
    (tmp_path / "y").unlink()
    assert wakes(watch)
    watch.close()


def test_no_inotify_is_named(mesh: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def inotify_init1(self, flags: int) -> int:
            return -1

    monkeypatch.setattr("ctypes.CDLL", lambda *args, **kwargs: Libc())
    source = FileSource(mesh, state, "a")
    assert source.fds() == [] and not source.drain()
    (problem,) = source.snapshot().problems
    assert problem.reason == "MeshFileUnwatched" and not problem.fatal
    by_rename(mesh)
    assert members(source.snapshot()) == "abc"
