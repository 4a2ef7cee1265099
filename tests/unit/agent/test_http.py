"""The HTTP side of the agent, over real sockets."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ovsmesh.agent.http import AgentHttp, Counters
from ovsmesh.dataplane.report import Condition, Peer, Report, Self, Traffic
from ovsmesh.errors import OvsmeshError, Problem
from ovsmesh.reasons import Reason

COUNTERS = Counters(7, 1, 1.8e9, 0.03, {"routes": 2}, {("ports", "+"): 5})


def made(peers: Any = 2, **changes: Any) -> Any:
    every = tuple(Peer(f"web{n}", "ok", f"192.0.2.{n}", traffic=Traffic(1, 2)) for n in range(peers))
    conditions = (Condition("Converged", "True", Reason.AsWanted),)
    report = Report(1.8e9, "web9 is converged", True, Self("web9", ovs_version="3.1.0"), conditions, every, (), (), ())
    return replace(report, **changes)


@pytest.fixture
def health() -> Iterator[Any]:
    health = AgentHttp("127.0.0.1:0")
    yield health
    health.close()


def get(health: Any, path: Any = "/", method: Any = "GET", headers: Any = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", health.port, timeout=5)
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


def test_metrics(health: Any) -> None:
    health.publish(made(), COUNTERS)
    health.publish(made(), replace(COUNTERS, turns=8, duration=20.0))
    status, text, _ = get(health, "/metrics")
    found = series(text)
    assert status == 200
    assert found["ovsmesh_peers", ("state", "wanted")] == 2 and found["ovsmesh_peers", ("state", "held")] == 0
    assert found["ovsmesh_converged",] == 1
    assert found["ovsmesh_drift_total", ("kind", "routes")] == 2 and found["ovsmesh_drift_total", ("kind", "fdb")] == 0
    assert found["ovsmesh_apply_operations_total", ("kind", "ports"), ("op", "add")] == 5
    assert found["ovsmesh_reconcile_total",] == 8 and found["ovsmesh_reconcile_errors_total",] == 1
    assert found["ovsmesh_reconcile_duration_seconds_count",] == 2
    assert found["ovsmesh_reconcile_duration_seconds_bucket", ("le", "0.05")] == 1
    assert found["ovsmesh_reconcile_duration_seconds_bucket", ("le", "10.0")] == 1
    assert found["ovsmesh_reconcile_duration_seconds_sum",] == pytest.approx(20.03)
    assert found["ovsmesh_last_success_timestamp_seconds",] == 1.8e9
    assert found["ovsmesh_mesh_refused_nodes",] == 0
    assert next(key for key in found if key[0] == "ovsmesh_build_info")[1] == ("ovs_version", "3.1.0")
    assert "process_resident_memory_bytes" in text and "python_gc" not in text


def test_series_do_not_grow_with_peers(health: Any) -> None:
    health.publish(made(2), COUNTERS)
    few = get(health, "/metrics")[1].count("\n")
    health.publish(made(2000), COUNTERS)
    assert get(health, "/metrics")[1].count("\n") == few


def test_before_the_first_turn(health: Any) -> None:
    assert get(health, "/healthz")[0] == 200
    assert get(health, "/readyz")[0] == 503
    assert get(health, "/status.json")[0] == 503
    assert get(health)[0] == 200
    assert "ovsmesh_build_info" in get(health, "/metrics")[1]


def test_healthz_needs_a_turning_loop() -> None:
    health = AgentHttp("127.0.0.1:0", deadline=0.05)
    try:
        time.sleep(0.1)
        status, text, _ = get(health, "/healthz")
        assert status == 503 and "has not turned" in text
        health.beat()
        assert get(health, "/healthz")[0] == 200
    finally:
        health.close()


def test_readyz(health: Any) -> None:
    health.publish(made(converged=False), COUNTERS)
    assert get(health, "/readyz")[:2] == (503, "not converged: web9 is converged\n")
    health.publish(made(), COUNTERS)
    assert get(health, "/readyz")[0] == 200
    # the mesh's faults are its writer's: the node keeps what was good
    for node in ("", "web1", "web9"):
        health.publish(made(problems=(Problem(Reason.TurnFailed, "of the mesh", node=node),)), COUNTERS)
        assert get(health, "/readyz")[0] == 200
    health.publish(made(converged=False, pending=("= held port gre-web1 peer left (web1)",)), COUNTERS)
    assert get(health, "/readyz")[0] == 200
    down = made(converged=False, problems=(Problem(Reason.SwitchDown, "ovs-vswitchd does not answer"),))
    health.publish(down, COUNTERS)
    assert get(health, "/readyz")[:2] == (503, "not converged: ovs-vswitchd does not answer\n")


def test_page_is_escaped_and_bounded(health: Any) -> None:
    peer = Peer("<script>alert(1)</script>", "missing", missing=("port <b>",))
    report = made(1000, headline="<i>")
    health.publish(replace(report, peers=(*report.peers, peer)), COUNTERS)
    status, text, headers = get(health)
    assert status == 200 and "<script" not in text and "<i>" not in text and "<b>" not in text
    assert text.index("&lt;script") < text.index("web1<"), "the worst stands first"
    assert "and 701 more" in text and len(text) < 100_000
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_status_json(health: Any) -> None:
    health.publish(made(), COUNTERS)
    assert json.loads(get(health, "/status.json?x=1")[1])["self"]["name"] == "web9"


@pytest.mark.parametrize("path", ["/nope", "/../etc/passwd", "/metrics/", "/%2e%2e", "/" + "a" * 5000])
def test_strange_paths(health: Any, path: Any) -> None:
    status, text, _ = get(health, path)
    assert status == 404 and "passwd" not in text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE"])
def test_get_only(health: Any, method: Any) -> None:
    status, _, headers = get(health, "/metrics", method)
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
def test_strange_requests(health: Any, data: Any) -> None:
    with socket.create_connection(("127.0.0.1", health.port), timeout=5) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        client.recv(65536)
    assert get(health, "/healthz")[0] == 200


def test_slow_and_many_clients_do_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovsmesh.http_server._REQUEST_TIME", 0.5)
    health = AgentHttp("127.0.0.1:0")
    clients = [socket.create_connection(("127.0.0.1", health.port), timeout=10) for _ in range(40)]
    try:
        for client in clients:
            try:
                client.sendall(b"GET /")
            except OSError:
                continue
        end = time.monotonic() + 5
        while time.monotonic() < end:
            try:
                if get(health, "/healthz")[0] == 200:
                    break
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)
        else:
            pytest.fail("not answered")
        assert sum("process_request" in thread.name for thread in threading.enumerate()) <= 16
    finally:
        for client in clients:
            client.close()
        health.close()


def test_port_in_use_says_what_to_do(health: Any) -> None:
    with pytest.raises(OvsmeshError, match=rf"127.0.0.1:{health.port}: .*another ADDRESS:PORT"):
        AgentHttp(f"127.0.0.1:{health.port}")


@pytest.mark.parametrize("listen", ["", "9474", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:99999", "192.0.2.1:1", "..:1"])
def test_bad_addresses(listen: Any) -> None:
    with pytest.raises(OvsmeshError):
        AgentHttp(listen)


def test_ipv6() -> None:
    try:
        health = AgentHttp("[::1]:0")
    except OvsmeshError as e:
        pytest.skip(f"no IPv6 here: {e}")
    connection = http.client.HTTPConnection("::1", health.port, timeout=5)
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200
    connection.close()
    health.close()
