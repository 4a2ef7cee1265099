"""`kubectl ovsmesh COMMAND` against an API server that speaks WebSocket as Kubernetes' does, over real connections."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from ovsmesh.cli import kubectl
from ovsmesh.errors import OvsmeshError

PLUGIN = "from ovsmesh.cli.main import kubectl; kubectl()"
DATA = bytes(range(256)) * 300
"""Every byte, and more than one frame's length field of 16 bits takes."""


def frame(channel: int, data: bytes, opcode: int = 2, last: bool = True) -> bytes:
    body = bytes([channel]) + data if channel >= 0 else data
    size = len(body)
    length = bytes([min(size, 125)])
    if size > 125:
        length = b"\x7e" + struct.pack("!H", size) if size < 65536 else b"\x7f" + struct.pack("!Q", size)
    return bytes([opcode | 128 * last]) + length + body


def ended(code: int) -> bytes:
    if not code:
        return frame(3, b'{"status":"Success"}')
    cause = {"reason": "ExitCode", "message": str(code)}
    return frame(
        3, json.dumps({"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": [cause]}}).encode()
    )


def agent(node: str, state: str = "running", ready: bool = True) -> dict[str, Any]:
    status = {"name": "agent", "ready": ready, "state": {state: {"reason": "CrashLoopBackOff"}}}
    meta = {"name": f"ovsmesh-agent-{node}", "namespace": "ovsmesh"}
    return {"metadata": meta, "spec": {"nodeName": node}, "status": {"phase": "Running", "containerStatuses": [status]}}


class Server:
    """An API server with agents' pods; `frames` are what an exec answers, `refused` are paths that are forbidden."""

    def __init__(self, folder: Path) -> None:
        self.agents = [agent("web1"), agent("web2"), agent("web3", "waiting", False)]
        self.pods: dict[str, dict[str, Any]] = {}
        self.frames = frame(1, b"well\n") + ended(0)
        self.refused = ""
        self.asked: list[tuple[str, Mapping[str, list[str]]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                if outer.refused and url.path.endswith(outer.refused):
                    self.reply(403, {"reason": "Forbidden", "message": f"you may not {url.path}"})
                elif url.path.endswith("/exec") and self.headers["Accept"] != "*/*":
                    self.reply(406, {"reason": "NotAcceptable"})
                elif url.path.endswith("/exec"):
                    outer.asked.append((url.path, parse_qs(url.query)))
                    key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
                    self.send_response(101)
                    self.send_header("Upgrade", "websocket")
                    self.send_header("Connection", "Upgrade")
                    accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
                    self.send_header("Sec-WebSocket-Accept", accept)
                    self.send_header("Sec-WebSocket-Protocol", "v5.channel.k8s.io")
                    self.end_headers()
                    self.wfile.write(outer.frames)
                    self.close_connection = True
                elif url.path.endswith("/namespaces/ovsmesh/pods"):
                    self.reply(200, {"metadata": {"resourceVersion": "1"}, "items": outer.agents})
                elif url.path.endswith("/meshslices"):
                    settings = {"clusterCIDRs": ["10.97.0.0/16"], "encapsulation": "gre"}
                    nodes = [
                        {"name": f"web{n}", "address": f"192.0.2.{n}", "podCIDRs": [f"10.97.{n}.0/24"]} for n in (1, 2)
                    ]
                    spec = {"mesh": "default", "index": 0, "count": 1, "meshGeneration": 1, "settings": settings}
                    item = {"metadata": {"name": "default-000"}, "spec": spec | {"nodes": nodes}}
                    self.reply(200, {"metadata": {"resourceVersion": "1"}, "items": [item]})
                elif (name := "/".join(url.path.split("/")[4::2])) in outer.pods:
                    self.reply(200, outer.pods[name])
                else:
                    self.reply(404, {"reason": "NotFound", "message": "not found"})

            def reply(self, code: int, body: object) -> None:
                data = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        cluster = {"server": f"http://127.0.0.1:{self.http.server_port}"}
        tree = {
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "namespace": "shop"}}],
            "clusters": [{"name": "c", "cluster": cluster}],
        }
        self.config = folder / "config"
        self.config.write_text(json.dumps(tree))
        self.folder = folder

    def run(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        argv = [sys.executable, "-c", PLUGIN, *arguments, f"--kubeconfig={self.config}"]
        ended = subprocess.run(argv, capture_output=True, timeout=50, check=False, cwd=self.folder)
        assert b"Traceback" not in ended.stderr, ended.stderr.decode()
        return ended

    def command(self) -> tuple[str, list[str]]:
        """The pod and the command of the only exec."""
        ((path, query),) = self.asked
        assert query["container"] == ["agent"]
        return path.split("/")[-2], query["command"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_output_and_exit_status_are_handed_through(server: Server) -> None:
    server.frames = (
        frame(1, DATA[:1000], last=False)
        + frame(-1, b"beat", opcode=9)
        + frame(-1, DATA[1000:], opcode=0)
        + frame(2, b"a warning\n")
        + frame(1, b"")
        + ended(2)
    )
    found = server.run("check", "--on", "web2", "--peer", "web1", "-o", "json")
    assert (found.returncode, found.stdout, found.stderr) == (2, DATA, b"a warning\n")
    assert server.command() == ("ovsmesh-agent-web2", ["ovsmesh", "check", "--peer", "web1", "-o", "json"])


def test_without_a_node_a_ready_agent_is_asked_and_named(server: Server) -> None:
    server.agents = [agent("web1", "waiting", False), agent("web2", ready=False), agent("web3")]
    found = server.run("history", "--since", "1h")
    assert (found.returncode, found.stdout) == (0, b"well\n") and b"node web3" in found.stderr
    assert server.command() == ("ovsmesh-agent-web3", ["ovsmesh", "history", "--since", "1h"])


def test_an_agent_that_is_not_ready_is_asked_where_it_is_named(server: Server) -> None:
    server.agents = [agent("web1"), agent("web2", ready=False)]
    assert server.run("check", "--on=web2").returncode == 0
    assert server.command()[0] == "ovsmesh-agent-web2"


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("web4", ["no agent runs on node web4", "did you mean web"]),
        ("web3", ["no agent's pod runs on node web3", "ovsmesh-agent-web3", "CrashLoopBackOff", "logs"]),
    ],
)
def test_a_node_without_a_running_agent_is_named_and_what_to_do(server: Server, node: str, words: list[str]) -> None:
    found = server.run("check", "--on", node)
    assert found.returncode == 1 and not found.stdout
    assert not [word for word in words if word not in found.stderr.decode()], found.stderr
    assert found.stderr.count(b"\n") == 1


def test_nothing_is_installed(server: Server) -> None:
    server.agents = []
    found = server.run("matrix")
    assert found.returncode == 1 and b"is ovsmesh installed there?" in found.stderr


@pytest.mark.parametrize(("path", "verb"), [("/exec", b"pods/exec"), ("/ovsmesh/pods", b"`list` on pods")])
def test_what_is_forbidden_says_what_it_needs(server: Server, path: str, verb: bytes) -> None:
    server.refused = path
    found = server.run("check", "--on", "web1")
    assert found.returncode == 1 and verb in found.stderr


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (frame(1, b"half") + frame(-1, b"\x03\xe8", opcode=8), "ended before the command did"),
        (b"\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xff", "a frame that no server sends"),
        (frame(3, b'{"status":"Failure","message":"no such file"}'), "can't be run in pod ovsmesh-agent-web1: no such"),
        (frame(3, b"nonsense"), "can't be run in pod"),
        (b"", "ended before the command did"),
    ],
)
def test_what_goes_wrong_on_the_way_is_one_line_and_exit_1(server: Server, frames: bytes, words: str) -> None:
    server.frames = frames
    found = server.run("check", "--on", "web1")
    assert found.returncode == 1 and words in found.stderr.decode()


def test_a_wrong_option_is_refused_here(server: Server) -> None:
    found = server.run("check", "--pear", "web2")
    assert found.returncode == 2 and b"--pear" in found.stderr and not server.asked


# trace and bundle, whose arguments are looked at


def pod(name: str, node: str, address: str) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"nodeName": node}, "status": {"podIP": address, "phase": "Pending"}}


@pytest.mark.parametrize(
    ("source", "destination", "command", "node"),
    [
        ("cart", "web1", ["10.97.2.7", "web1"], "web2"),
        ("other/db", "cart", ["10.97.1.9", "10.97.2.7"], "web1"),
        ("10.97.2.7", "8.8.8.8", ["10.97.2.7", "8.8.8.8"], "web2"),
        ("192.0.2.1", "10.97.2.7", ["192.0.2.1", "10.97.2.7"], "web1"),
        ("web2", "10.97.1.9", ["web2", "10.97.1.9"], "web2"),
    ],
)
def test_the_ends_of_a_trace_are_looked_up_and_the_sources_node_is_asked(
    server: Server, source: str, destination: str, command: list[str], node: str
) -> None:
    server.pods = {"shop/cart": pod("cart", "web2", "10.97.2.7"), "other/db": pod("db", "web1", "10.97.1.9")}
    arguments = ["-o", "json", source, destination]
    assert kubectl.run("trace", arguments, [source, destination], "", str(server.config)) == 0
    assert server.command() == (f"ovsmesh-agent-{node}", ["ovsmesh", "trace", "-o", "json", *command])


def test_a_name_that_is_no_pod_and_a_pod_without_an_address_are_named(server: Server) -> None:
    server.pods = {"shop/new": pod("new", "", "")}
    with pytest.raises(OvsmeshError, match="kart: no pod in namespace shop has this name"):
        kubectl.run("trace", ["kart", "web1"], ["kart", "web1"], "", str(server.config))
    with pytest.raises(OvsmeshError, match="pod shop/new has no address yet; its phase is Pending"):
        kubectl.run("trace", ["new", "web1"], ["new", "web1"], "", str(server.config))


def test_a_bundle_comes_to_a_local_file_byte_by_byte(server: Server, tmp_path: Path) -> None:
    server.frames = frame(1, DATA[:70000]) + frame(2, b"12 parts\n") + frame(1, DATA[70000:]) + ended(0)
    target = tmp_path / "b.tar.gz"
    assert kubectl.run("bundle", [f"--output={target}"], [], "web1", str(server.config)) == 0
    assert target.read_bytes() == DATA and target.stat().st_mode & 0o777 == 0o600
    assert server.command() == ("ovsmesh-agent-web1", ["ovsmesh", "bundle", "-o", "-"])
    kubectl.run("bundle", ["-o", str(tmp_path)], [], "web1", str(server.config))
    (named,) = tmp_path.glob("ovsmesh-web1-*.tar.gz")
    assert named.read_bytes() == DATA


def test_half_a_bundle_is_not_written(server: Server, tmp_path: Path) -> None:
    for frames in (frame(1, DATA), frame(1, DATA) + ended(1), ended(0)):
        server.frames = frames
        with pytest.raises(OvsmeshError):
            kubectl.run("bundle", ["-o", str(tmp_path / "b")], [], "web1", str(server.config))
    assert not (tmp_path / "b").exists()
