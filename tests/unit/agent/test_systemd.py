"""What systemd is told, on real datagram sockets, and that a hostile NOTIFY_SOCKET is ignored."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ovsmesh.agent.result import AgentCounters, NodeStatus, ReconcileResult
from ovsmesh.agent.systemd import SystemdNotifier, status_line
from ovsmesh.dataplane.plan import plan
from ovsmesh.dataplane.types import Dataplane
from ovsmesh.errors import Problem
from ovsmesh.reasons import Reason
from tests.support.meshkit import FACTS, first, seen, want


def result(*problems: Any, have: Any = None) -> Any:
    mesh = first(3)
    wanted = want(mesh)
    todo = plan(wanted, seen(wanted if have is None else have))
    return ReconcileResult(mesh, FACTS, wanted, None, todo, problems, not todo.steps and not problems, True)


class Systemd(NamedTuple):
    """A socket as systemd's, and how NOTIFY_SOCKET names it."""

    name: str
    listener: socket.socket


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@ovsmesh-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0"))
        listener.setblocking(False)
        yield Systemd(name, listener)


@pytest.fixture
def notifier_of() -> Iterator[Any]:
    with ExitStack() as ending:

        def make(environ: Any) -> Any:
            made = SystemdNotifier(environ)
            ending.callback(made.close)
            return made

        yield make


def heard(systemd: Any) -> Any:
    found = []
    while True:
        try:
            found += systemd.listener.recv(4096).decode().splitlines()
        except BlockingIOError:
            return found


def test_ready_with_the_first_reconcile_however_it_ended_and_stopping_at_the_end(
    systemd: Any, notifier_of: Any
) -> None:
    environ = {"NOTIFY_SOCKET": systemd.name, "PATH": "/bin"}
    notifier = notifier_of(environ)
    assert environ == {"PATH": "/bin"}
    notifier.idle()
    assert heard(systemd) == []
    notifier.publish(NodeStatus(result(Problem(Reason.TunnelAddressMissing, "is on no link")), AgentCounters()))
    assert heard(systemd) == ["READY=1", "STATUS=2 peers, not converged; is on no link"]
    notifier.publish(NodeStatus(result(), AgentCounters()))
    notifier.publish(NodeStatus(result(), AgentCounters()))
    assert heard(systemd) == ["STATUS=2 peers, converged"]
    notifier.close()
    notifier.close()
    assert heard(systemd) == ["STOPPING=1", "STATUS=stopping; what is in place stays"]


def test_the_watchdog_is_fed_at_half_its_time_by_the_loop(
    systemd: Any, monkeypatch: pytest.MonkeyPatch, notifier_of: Any
) -> None:
    now = [100.0]
    monkeypatch.setattr("ovsmesh.agent.systemd.time.monotonic", lambda: now[0])
    notifier = notifier_of(
        {"NOTIFY_SOCKET": systemd.name, "WATCHDOG_USEC": "4000000", "WATCHDOG_PID": str(os.getpid())}
    )
    beats = []
    for _ in range(10):
        notifier.idle()
        beats.append(len(heard(systemd)))
        now[0] += 0.5
    assert beats == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("more", [{"WATCHDOG_PID": "1", "WATCHDOG_USEC": "4000000"}, {"WATCHDOG_USEC": "soon"}, {}])
def test_a_watchdog_of_another_process_or_none_is_not_fed(systemd: Any, more: Any, notifier_of: Any) -> None:
    notifier = notifier_of({"NOTIFY_SOCKET": systemd.name, **more})
    notifier.idle()
    assert heard(systemd) == []


@pytest.mark.parametrize(
    "address", ["", "relative", "/nowhere/at/all", "vsock:2:99", "/" + 200 * "x", "/nul\0in", "@", "/dev/null", "/tmp"]
)
def test_a_socket_that_is_nobodys_is_ignored(address: Any, notifier_of: Any) -> None:
    notifier = notifier_of({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1"})
    notifier.publish(NodeStatus(result(), AgentCounters()))
    notifier.idle()
    notifier.close()


def test_what_did_not_fit_is_said_again(systemd: Any, notifier_of: Any) -> None:
    notifier = notifier_of({"NOTIFY_SOCKET": systemd.name})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as flood:
        flood.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                flood.sendto(b"X=1", systemd.name.replace("@", "\0"))
    notifier.publish(NodeStatus(result(), AgentCounters()))
    assert "READY=1" not in heard(systemd)
    notifier.publish(NodeStatus(result(), AgentCounters()))
    assert heard(systemd) == ["READY=1", "STATUS=2 peers, converged"]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (result(), "2 peers, converged"),
        (result(have=Dataplane()), "2 peers, not converged"),
        (
            result(Problem(Reason.TurnFailed, "bad\nREADY=1\x00 name", fatal=True)),
            "2 peers, not converged; bad READY=1  name",
        ),
        (ReconcileResult(problems=(Problem(Reason.TurnFailed, "no file"),)), "no mesh yet; no file"),
        (
            ReconcileResult(first(2), problems=(Problem(Reason.TurnFailed, 999 * "y"),)),
            "the last reconcile failed; yyy",
        ),
    ],
)
def test_the_status_is_one_short_line(found: Any, said: Any) -> None:
    text = status_line(found)
    assert text.startswith(said) and len(text) <= 200 and "\n" not in text
