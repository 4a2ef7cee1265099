"""An agent whose Namespace is being deleted: it removes all that is managed, and says so to the switch's pod."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.agent import cleanup, main
from ovsmesh.agent.options import Options
from ovsmesh.errors import OvsmeshError


class Fake:
    """What an agent needs for its end; `seen` is what happened, in order."""

    def __init__(self, folder: Any, left: Any) -> None:
        self.left = list(left)
        self.seen: list[str] = []
        self.options = Options("", "n", f"unix:{folder}/db.sock", str(folder / "state"), "")
        self.marker = folder / main.REMOVING
        self.stop, self.write = os.pipe()
        self.fd = os.eventfd(0)
        self.leaving = True

    def run(self, fds: Any, publishers: Any) -> None:
        assert self.fd in fds
        self.seen.append(f"run, marker {self.marker.exists()}")

    def ask(self) -> Any:
        return self.leaving

    def remove(self, options: Any, state: Any) -> Any:
        self.seen.append(f"remove, marker {self.marker.exists()}")
        found = self.left.pop(0)
        if not self.left:
            # the kubelet's word, which comes at any time
            os.write(self.write, b"x")
        if isinstance(found, OvsmeshError):
            raise found
        return ["said"], found


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    made = Fake(tmp_path, request.param)

    @contextlib.contextmanager
    def agent(options: Any, state: Any, history: Any, patience: Any, probing: bool) -> Iterator[Any]:
        yield main._Agent(made, (), made)  # type: ignore[arg-type]
        made.seen.append("closed")

    monkeypatch.setattr(main, "_agent", agent)
    monkeypatch.setattr(main, "_AGAIN", 0.01)
    monkeypatch.setattr(cleanup, "remove", made.remove)
    yield made
    for fd in (made.stop, made.write, made.fd):
        os.close(fd)


def left(fake: Any) -> Any:
    return [path.name for path in fake.marker.parent.glob("ovsmesh.*")]


@pytest.mark.parametrize("fake", [[False, OvsmeshError("no switch"), True]], indirect=True)
def test_what_is_left_is_removed_again_under_a_marker(fake: Any) -> None:
    fake.marker.touch()  # of an earlier one that was killed at this
    main.serve(fake.options, fake.stop)
    assert fake.seen == ["run, marker False", "closed", *["remove, marker True"] * 3]
    assert left(fake) == [main.REMOVED]


@pytest.mark.parametrize("fake", [[False]], indirect=True)
def test_there_is_an_end_to_it_when_told(fake: Any) -> None:
    main.serve(fake.options, fake.stop)
    assert fake.seen[-1] == "remove, marker True"
    assert left(fake) == []


@pytest.mark.parametrize("fake", [[True]], indirect=True)
def test_a_roll_out_removes_nothing(fake: Any) -> None:
    fake.leaving = False
    main.serve(fake.options, fake.stop)
    assert fake.seen == ["run, marker False", "closed"]
    assert left(fake) == []
