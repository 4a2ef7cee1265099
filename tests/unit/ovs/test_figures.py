"""The switch's figures come over sockets that may be dead, silent or hostile: then they are unknown, and soon."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.dataplane.report import Traffic
from ovsmesh.ovs import figures
from ovsmesh.ovs.datapath import port_types
from ovsmesh.ovs.figures import SwitchReader

COUNTERS = [["rx_packets", 12], ["tx_packets", 34], ["rx_bytes", 1200], ["tx_bytes", 3400], ["rx_errors", 1]]
ROWS = [
    {"name": "gre-h2", "statistics": ["map", [*COUNTERS, ["tx_dropped", 2]]]},
    {"name": "fresh", "statistics": ["map", []]},
]


class Server:
    """Answers each connection with `answer`, in two parts; with None it never does."""

    def __init__(self, path: Path, answer: bytes | None) -> None:
        self._answer = answer
        self.asked: list[bytes] = []
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(link)
            self.asked.append(link.recv(4096))
            # the reader may have gone
            with contextlib.suppress(OSError):
                for part in () if self._answer is None else (self._answer[:7], self._answer[7:]):
                    link.sendall(part)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in (self._listener, *self._open):
            each.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    servers: list[Server] = []

    def make(name: str, answer: object) -> Server:
        data = answer if isinstance(answer, bytes) or answer is None else json.dumps(answer).encode()
        servers.append(Server(tmp_path / name, data))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def reader(tmp_path: Path) -> SwitchReader:
    return SwitchReader(f"unix:{tmp_path}/db.sock")


def answer(result: object) -> object:
    return {"id": 0, "error": None, "result": result}


def test_counters_and_version_are_read_and_kept_for_a_while(tmp_path: Path, serve: Any) -> None:
    database = serve("db.sock", answer([{"rows": ROWS}]))
    serve("ovs-vswitchd.7.ctl", answer("ovs-vswitchd (Open vSwitch) 3.1.0\n"))
    read = reader(tmp_path)
    found = read()
    assert found.version == "3.1.0"
    assert found.traffic == {"gre-h2": Traffic(12, 34, 1200, 3400, 3), "fresh": Traffic()}
    assert read() is found and len(database.asked) == 1


def test_a_switch_that_left_its_socket_behind_is_passed_over(tmp_path: Path, serve: Any) -> None:
    (tmp_path / "ovs-vswitchd.1.ctl").touch()
    serve("ovs-vswitchd.2.ctl", answer("ovs-vswitchd (Open vSwitch) 3.3.1"))
    assert reader(tmp_path)().version == "3.3.1"


@pytest.mark.parametrize(
    "said", [None, b"", b"}", b"[1]", b"\xff}", b"[" * 100000 + b"}", answer(None), answer([{"rows": [{"name": 1}]}])]
)
def test_what_is_no_usable_answer_is_unknown(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch, said: object
) -> None:
    monkeypatch.setattr("ovsmesh.ovs.json_rpc.DEADLINE", 0.2)
    for name in ("db.sock", "ovs-vswitchd.1.ctl"):
        serve(name, said)
    assert reader(tmp_path)() == figures.SwitchFigures()


def test_no_open_vswitch_at_all(tmp_path: Path) -> None:
    assert reader(tmp_path)() == figures.SwitchFigures()


SHOWN = """\
system@ovs-system:
  lookups: hit:0 missed:0 lost:0
  flows: 0
  port 0: ovs-system (internal)
  port 1: obr0 (internal)
  port 2: gre_sys (gre: packet_type=ptap)
"""


def test_the_types_of_all_ports_are_told(tmp_path: Path, serve: Any) -> None:
    switch = serve("ovs-vswitchd.7.ctl", answer(SHOWN))
    assert port_types(tmp_path) == frozenset({"internal", "gre"})
    assert json.loads(switch.asked[0])["method"] == "dpctl/show"


@pytest.mark.parametrize("said", [None, b"", b"[1]", {"id": 0, "error": "no such command", "result": None}])
def test_a_switch_that_does_not_tell_has_no_ports(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch, said: object
) -> None:
    monkeypatch.setattr("ovsmesh.ovs.json_rpc.DEADLINE", 0.2)
    serve("ovs-vswitchd.7.ctl", said)
    assert port_types(tmp_path) is None


def test_no_switch_has_no_ports(tmp_path: Path) -> None:
    assert port_types(tmp_path) is None
