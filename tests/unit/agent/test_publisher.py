"""What the agent publishes over HTTP, over real sockets."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ovsmesh import http_server
from ovsmesh.agent import result as module
from ovsmesh.agent.publisher import AgentHttp, StatusPublisher
from ovsmesh.agent.result import AgentCounters, NodeStatus, ReconcileResult
from ovsmesh.dataplane.plan import Plan, Step
from ovsmesh.dataplane.report import Condition, Peer, Report, Self, Traffic
from ovsmesh.dataplane.types import State
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.history import Event, History
from ovsmesh.reasons import Reason
from ovsmesh.state_dir import StateDir

COUNTERS = AgentCounters(
    drift=Counter(routes=2),
    operations=Counter({("ports", "+"): 5}),
    reconciles=7,
    failures=1,
    last_success=1.8e9,
)


def made(peers: Any = 2, **changes: Any) -> Any:
    every = tuple(Peer(f"web{n}", "ok", f"192.0.2.{n}", traffic=Traffic(1, 2)) for n in range(peers))
    conditions = (Condition("Converged", "True", Reason.AsWanted),)
    report = Report(1.8e9, "web9 is converged", True, Self("web9", ovs_version="3.1.0"), conditions, every, (), (), ())
    return replace(report, **changes)


class Made(NodeStatus):
    """A status with a report of the test's own."""

    def __init__(self, report: Report, counters: AgentCounters = COUNTERS, **changes: Any) -> None:
        changes = {"problems": report.problems, **changes}
        result = ReconcileResult(converged=report.converged, **changes)
        super().__init__(result, counters)
        self._report = report


@pytest.fixture
def served() -> Iterator[Any]:
    served = AgentHttp("127.0.0.1:0")
    yield served
    served.close()


def get(served: Any, path: Any = "/", method: Any = "GET", headers: Any = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=5)
    try:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read().decode(), response.headers
    finally:
        connection.close()


def series(text: Any) -> Any:
    return {
        (s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }


def test_metrics(served: Any) -> None:
    durations = COUNTERS.durations.plus(0.03).plus(20.0)
    served.publish(Made(made(), replace(COUNTERS, durations=durations)))
    status, text, _ = get(served, "/metrics")
    found = series(text)
    assert status == 200
    assert found["ovsmesh_peers_wanted",] == 2 and found["ovsmesh_peers", ("state", "held")] == 0
    assert found["ovsmesh_converged",] == 1
    assert found["ovsmesh_drift_total", ("kind", "routes")] == 2 and found["ovsmesh_drift_total", ("kind", "fdb")] == 0
    assert found["ovsmesh_apply_operations_total", ("kind", "ports"), ("op", "add")] == 5
    assert found["ovsmesh_reconcile_total",] == 7 and found["ovsmesh_reconcile_errors_total",] == 1
    assert found["ovsmesh_reconcile_duration_seconds_count",] == 2
    assert found["ovsmesh_reconcile_duration_seconds_bucket", ("le", "0.05")] == 1
    assert found["ovsmesh_reconcile_duration_seconds_bucket", ("le", "10.0")] == 1
    assert found["ovsmesh_reconcile_duration_seconds_sum",] == pytest.approx(20.03)
    assert found["ovsmesh_last_success_timestamp_seconds",] == 1.8e9
    assert found["ovsmesh_mesh_refused_nodes",] == 0
    assert next(key for key in found if key[0] == "ovsmesh_build_info")[1] == ("ovs_version", "3.1.0")
    assert "process_resident_memory_bytes" in text and "python_gc" not in text


def test_before_the_first_reconcile(served: Any) -> None:
    assert get(served, "/healthz")[0] == 200
    assert get(served, "/readyz")[0] == 503
    assert get(served, "/status.json")[0] == 503
    assert get(served)[0] == 200
    assert "ovsmesh_build_info" in get(served, "/metrics")[1]


def test_healthz_needs_a_loop_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(http_server, "time", SimpleNamespace(monotonic=lambda: now[0]))
    served = AgentHttp("127.0.0.1:0")
    try:
        now[0] += http_server.LOOP_DEADLINE
        assert get(served, "/healthz")[0] == 200
        now[0] += 1
        status, text, _ = get(served, "/healthz")
        assert status == 503 and "has not run" in text
        served.beat()
        assert get(served, "/healthz")[0] == 200
    finally:
        served.close()


def test_readyz(served: Any) -> None:
    served.publish(Made(made(converged=False)))
    assert get(served, "/readyz")[:2] == (503, "not converged: web9 is converged\n")
    served.publish(Made(made()))
    assert get(served, "/readyz")[0] == 200
    # the mesh's faults are its writer's: the node keeps what was good
    for node in ("", "web1", "web9"):
        served.publish(Made(made(problems=(Problem(Reason.TurnFailed, "of the mesh", node=node),))))
        assert get(served, "/readyz")[0] == 200
    served.publish(Made(made(converged=False), plan=Plan(held=(Step("-", "fdb", "x", None, "y"),))))
    assert get(served, "/readyz")[0] == 200
    down = made(converged=False, problems=(Problem(Reason.SwitchDown, "ovs-vswitchd does not answer"),))
    served.publish(Made(down))
    assert get(served, "/readyz")[:2] == (503, "not converged: ovs-vswitchd does not answer\n")


def test_the_page_is_one_file_that_loads_nothing_else(served: Any) -> None:
    status, text, headers = get(served)
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert not re.search(r"""\b(?:src|href|action|style|on[a-z]+)\s*=\s*["']|@import|url\(|innerHTML|\beval\b""", text)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "connect-src 'self'" in policy
    assert "unsafe" not in policy


def test_documents_are_served_once_they_are_there(served: Any, tmp_path: Path) -> None:
    assert get(served, "/history.json")[0] == 404
    publisher = StatusPublisher("127.0.0.1:0", StateDir(tmp_path))
    try:
        http_of = publisher._http
        publisher.serve("/history.json", lambda: {"entries": []})
        status, text, headers = get(http_of, "/history.json")
        assert (status, json.loads(text)) == (200, {"entries": []})
        assert headers["Content-Type"].startswith("application/json")
        assert "/history.json" in get(http_of, "/nope")[1]
    finally:
        publisher.close()


@pytest.mark.parametrize("path", ["/", "/status.json", "/nope"])
def test_strangers_read_health_and_metrics_only(served: Any, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    served.publish(Made(made()))
    seen = iter(["10.97.1.5", "192.0.2.11"] * 5)
    monkeypatch.setattr(http_server, "_unmapped", lambda _: ip_address(next(seen)))
    status, text, _ = get(served, path)
    assert status == 403 and "kubectl port-forward" in text and "web9" not in text
    for public in ("/metrics", "/healthz", "/readyz"):
        assert get(served, public)[0] == 200


def test_this_host_s_own_address_is_no_stranger(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served.publish(Made(made()))
    monkeypatch.setattr(http_server, "_unmapped", lambda _: ip_address("192.0.2.11"))
    assert get(served, "/status.json")[0] == 200


@pytest.mark.parametrize(
    "host", ["localhost:9474", "127.0.0.1:9474", "192.0.2.11", "[::1]:9474", "[fd00::1]", "web1:9474"]
)
def test_the_page_is_for_an_address(served: Any, host: str) -> None:
    assert get(served, "/", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9474", "127.0.0.1.evil.example", "[evil.x]:1", "localhost.x."]
)
def test_a_web_site_s_name_for_this_host_is_refused(served: Any, host: str) -> None:
    assert get(served, "/", headers={"Host": host})[0] == 403
    assert get(served, "/metrics", headers={"Host": host})[0] == 200


def test_status_json(served: Any) -> None:
    served.publish(Made(made()))
    assert json.loads(get(served, "/status.json?x=1")[1])["self"]["name"] == "web9"


def test_history_json_has_the_last_entries_also_before_the_first_reconcile() -> None:
    history = History()
    history.add(Event.START, "ovsmesh starts")
    server = AgentHttp("127.0.0.1:0", {"/history.json": history.document})
    try:
        status, text, _ = get(server, "/history.json")
    finally:
        server.close()
    assert status == 200
    (entry,) = json.loads(text)["entries"]
    assert (entry["event"], entry["what"], entry["who"]) == ("start", "ovsmesh starts", None)


@pytest.mark.parametrize("path", ["/nope", "/../etc/passwd", "/metrics/", "/%2e%2e", "/" + "a" * 5000])
def test_strange_paths(served: Any, path: Any) -> None:
    status, text, _ = get(served, path)
    assert status == 404 and "passwd" not in text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE"])
def test_get_only(served: Any, method: Any) -> None:
    status, _, headers = get(served, "/metrics", method)
    assert status == 405 and headers["Allow"] == "GET"


@pytest.mark.parametrize(
    "data",
    [
        b"\0\1\2\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"GET /\xc3\xa9\xff HTTP/1.1\r\n\r\n",
        b"BREW / HTTP/1.1\r\n\r\n",
        b"\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -5\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_strange_requests(served: Any, data: Any) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        client.recv(65536)
    assert get(served, "/healthz")[0] == 200


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """What stands for all addresses here, as a test stays on loopback."""
    monkeypatch.setattr(http_server, "_EVERYWHERE", ("127.0.0.2",))
    return "127.0.0.2"


@pytest.mark.parametrize("target", ["127.0.0.1", "127.0.0.2"])
def test_slow_and_many_clients_keep_nobody_from_an_answer(everywhere: str, target: str) -> None:
    served = AgentHttp(f"{target}:0")
    slow: list[socket.socket] = []
    try:
        for n in range(80):
            slow.append(socket.create_connection((target, served.port), timeout=10, source_address=("127.0.0.3", 0)))
            with suppress(OSError):
                slow[-1].sendall(b"GET /")
            if n % 4 == 3:
                assert get(served, "/healthz")[0] == 200
        end = time.monotonic() + 30
        while sum("process_request" in thread.name for thread in threading.enumerate()) > 16:
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        for client in slow:
            client.close()
        served.close()


def test_a_slow_client_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovsmesh.http_server._REQUEST_TIME", 0.5)
    with (
        closing(AgentHttp("127.0.0.1:0")) as served,
        socket.create_connection(("127.0.0.1", served.port), timeout=30) as client,
    ):
        client.sendall(b"GET /")
        assert client.recv(1) == b""


def test_a_server_for_all_addresses_is_not_shared_with_another_process(everywhere: str) -> None:
    with closing(AgentHttp(f"{everywhere}:0")) as served:
        for listen in (everywhere, "127.0.0.1"):
            with pytest.raises(OvsmeshError, match="can't listen there"):
                AgentHttp(f"{listen}:{served.port}")
        assert get(served, "/healthz")[0] == 200


def test_port_in_use_says_what_to_do(served: Any) -> None:
    with pytest.raises(OvsmeshError, match=rf"127.0.0.1:{served.port}: .*another ADDRESS:PORT"):
        AgentHttp(f"127.0.0.1:{served.port}")


@pytest.mark.parametrize("listen", ["", "9474", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:99999", "192.0.2.1:1", "..:1"])
def test_bad_addresses(listen: Any) -> None:
    with pytest.raises(OvsmeshError):
        AgentHttp(listen)


def test_ipv6() -> None:
    try:
        served = AgentHttp("[::1]:0")
    except OvsmeshError as e:
        pytest.skip(f"no IPv6 here: {e}")
    connection = http.client.HTTPConnection("::1", served.port, timeout=5)
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200
    connection.close()
    served.close()


def test_the_report_is_made_once_and_only_when_somebody_asks(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def report(result: ReconcileResult, node: str, *_: Any) -> Report:
        asked.append(node)
        found: Report = made()
        return found

    monkeypatch.setattr(module, "report", report)
    status = NodeStatus(ReconcileResult(converged=True), COUNTERS, "web9")
    served.publish(status)
    assert get(served, "/readyz")[0] == 200 and not asked
    assert get(served, "/metrics")[0] == get(served, "/status.json")[0] == 200
    assert status.report.headline == "web9 is converged" and asked == ["web9"]


def test_a_status_does_not_change_with_what_is_counted_later() -> None:
    counters = AgentCounters(last_change={"web1": (1.0, "+ port")})
    status = NodeStatus(ReconcileResult(), counters)
    counters.drift["routes"] += 1
    counters.last_change["web2"] = (2.0, "+ port")
    assert not status.counters.drift and list(status.counters.last_change) == ["web1"]


def file_of(publisher: StatusPublisher, state: StateDir, status: NodeStatus) -> Any:
    """Return the status file once the publisher has had its time."""
    publisher.publish(status)
    publisher.idle()
    thread = publisher._file._thread
    assert thread is not None
    thread.join(30)
    return state.status()


def test_the_last_report_is_kept_in_the_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovsmesh.agent.publisher._WRITE_AGAIN", 0.0)
    monkeypatch.setattr("ovsmesh.agent.publisher._WRITE_SHARE", float("inf"))
    state = StateDir(tmp_path)
    publisher = StatusPublisher("127.0.0.1:0", state)
    try:
        one = Made(made(), problems=(Problem(Reason.ApplyFailed, "flows: no"),))
        told = file_of(publisher, state, one)
        assert told["headline"] == "web9 is converged" and told["listen"].startswith("127.0.0.1:")
        (tmp_path / "status.json").unlink()
        same = Made(made(headline="never shown"), problems=one.result.problems)
        assert file_of(publisher, state, same) is None, "it says the same"
        assert file_of(publisher, state, Made(made(headline="another")))["headline"] == "another"
        reached = Made(made(headline="a peer was lost"), problems=one.result.problems)
        reached.states = {"web2": State.UNREACHABLE}
        file_of(publisher, state, one)
        assert file_of(publisher, state, reached)["headline"] == "a peer was lost", "published for the probes"
    finally:
        publisher.close()


def test_reports_that_take_long_are_written_as_seldom(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    publisher = StatusPublisher("", state)
    file_of(publisher, state, Made(made()))
    publisher._file._took, publisher._file._next = 1.0, 0.0
    other = Made(made(headline="another"))
    other.states = {"web2": State.UNREACHABLE}
    assert file_of(publisher, state, other)["headline"] == "another"
    assert publisher._file._next > time.monotonic() + 100.0
    publisher.close()


def test_the_status_file_says_until_when_it_was_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateDir(tmp_path)
    publisher = StatusPublisher("", state)
    assert file_of(publisher, state, Made(made()))["listen"] == ""
    os.utime(tmp_path / "status.json", (1.0, 1.0))
    for module_time in ("_next", "_touch_at"):
        monkeypatch.setattr(publisher._file, module_time, 0.0)
    publisher.idle()
    now = state.status_time()
    assert now is not None and now > time.time() - 60
    publisher.publish(Made(made(headline="the last word")))
    publisher.close()
    told = state.status()
    assert told is not None and told["headline"] == "the last word"


def test_a_port_that_becomes_free_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovsmesh.agent.publisher._LISTEN_AGAIN", 0.0)
    with closing(socket.create_server(("127.0.0.1", 0))) as holder:
        port = holder.getsockname()[1]
        publisher = StatusPublisher(f"127.0.0.1:{port}", StateDir(tmp_path))
        publisher.publish(NodeStatus(ReconcileResult(converged=True), COUNTERS))
    publisher.idle()
    try:
        assert get(SimpleNamespace(port=port), "/readyz")[:2] == (200, "ok\n")
    finally:
        publisher.close()
