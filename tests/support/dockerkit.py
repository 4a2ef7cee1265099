"""A real dockerd in each lab host's namespace, with its containers, for the tests of --docker.

It uses Docker's API over the socket. No service of the machine is touched.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ovsmesh.lab import netns
from ovsmesh.lab.host import Host
from ovsmesh.lab.netns import wait_for
from tests.support import docker_restart as script
from tests.support.docker_versions import OWN, Kind
from tests.support.needs import needs

SOON = 60.0


def version() -> tuple[int, int]:
    """Return the major and minor version of this machine's dockerd; (0, 0) without one."""
    if not shutil.which("dockerd"):
        return (0, 0)
    said = subprocess.run(["dockerd", "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    found = re.search(r"version (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)


without_kbr0 = pytest.mark.skipif(
    version() > (20, 10),
    reason="not solved: a Docker newer than 20.10 whose start kbr0 has failed once keeps a note of that network, and"
    " refuses to start on kbr0 from then on: networks have same bridge name",
)
"""For a test in which dockerd starts before kbr0 is there, or ends while it starts."""
PLAIN = "{}\n"
PLAIN_ARGV = 7
"""Words of a dockerd's command line without further options."""
SCRIPT = Path(script.__file__)
BUSYBOX = shutil.which("busybox") or "/bin/busybox"


class _Api(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("docker", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


@dataclass(frozen=True)
@needs("docker")
class Docker:
    """The Docker of one lab host."""

    host: Host
    dir: Path
    kind: Kind = OWN
    patience: int = 30
    """The agent's --docker-timeout, in seconds."""

    @property
    def config(self) -> Path:
        return self.dir / "config/daemon.json"

    @property
    def restart(self) -> str:
        return f"{sys.executable} {SCRIPT} {self.dir} {self.host.ns} restart"

    @property
    def options(self) -> list[str]:
        """What the agent of this host is to be given."""
        return [
            *("--docker-config", str(self.config), "--docker-socket", str(self.dir / "docker.sock")),
            *("--docker-restart", self.restart, "--docker-timeout", str(self.patience)),
        ]

    def prepare(self) -> None:
        self.dir.mkdir()
        (self.dir / "outside.pid").write_text(str(os.getpid()))
        found = [str(path or "") for path in (self.kind.root, self.kind.programs)]
        (self.dir / "root.json").write_text(json.dumps(found))
        self.configure(PLAIN)

    def reset(self) -> None:
        """Without agent, mesh and containers, on docker0, whatever a test has left."""
        host = self.host
        self.misbehave("")
        (self.dir / "argv.json").unlink(missing_ok=True)
        host.stop_agent(signal.SIGKILL)
        if (host.state / "agent").exists() and "kbr0" in links(host):
            if self.alive():
                self.clear()
            host.ovsmesh("cleanup", timeout=60)
        shutil.rmtree(host.state / "agent", ignore_errors=True)
        (self.dir / "restarts.log").unlink(missing_ok=True)
        if self.alive():
            self.clear()
        if not (self.config.is_file() and self.config.read_text() == PLAIN and self.on("docker0")):
            self.again(PLAIN)
        (self.dir / "restarts.log").unlink(missing_ok=True)

    def calm(self) -> None:
        """On docker0 again, while the mesh stays: for the tests in which nothing is to move."""
        self.misbehave("")
        (self.dir / "argv.json").unlink(missing_ok=True)
        self.host.stop_agent(signal.SIGKILL)
        for name in ("docker.json", "daemon.json.old", "daemon.json.last"):
            (self.host.state / "agent" / name).unlink(missing_ok=True)
        if self.alive():
            self.clear()
        plain = self.config.is_file() and not self.config.is_symlink() and self.config.stat().st_size < 10
        if not (plain and self.config.read_text() == PLAIN and self.on("docker0") and len(self.argv()) == PLAIN_ARGV):
            if self.config.is_dir():
                self.config.rmdir()
            else:
                self.config.unlink(missing_ok=True)
            self.again(PLAIN)
        (self.dir / "restarts.log").unlink(missing_ok=True)

    def argv(self) -> list[str]:
        return netns.command_line(self.pid()) if self.pid() else []

    def again(self, text: str | bytes, mode: int = 0o644) -> None:
        """Restart Docker with this file."""
        self.stop()
        self.configure(text, mode)
        self.start()

    def touch(self) -> None:
        os.utime(self.config)

    def clear(self) -> None:
        with contextlib.suppress(OSError, AssertionError, http.client.HTTPException):
            for container in self.api("GET", "/containers/json?all=1"):
                self.remove(container["Id"])

    def once(self, *more: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """`ovsmesh agent --once --docker replace`."""
        return self.host.ovsmesh("agent", "--once", "--docker", "replace", *self.options, *more, timeout=timeout)

    def configure(self, text: str | bytes | None, mode: int = 0o644) -> None:
        if text is None:
            self.config.unlink(missing_ok=True)
            return
        self.config.parent.mkdir(parents=True, exist_ok=True)
        self.config.write_bytes(text.encode() if isinstance(text, str) else text)
        self.config.chmod(mode)

    def start(self, check: bool = True) -> int:
        argv = [sys.executable, str(SCRIPT), str(self.dir), self.host.ns, "start"]
        code = subprocess.run(argv, stderr=subprocess.DEVNULL, timeout=60, check=False).returncode
        assert not (check and code), f"dockerd did not start: {self.log()}"
        return code

    def stop(self, how: int = signal.SIGTERM) -> None:
        script.stop(self.dir, how)
        if how == signal.SIGKILL:
            # a containerd of its own would hold its socket
            self.kill_containers()

    def alive(self) -> bool:
        return bool(script.running(self.dir))

    def pid(self) -> int:
        return script.running(self.dir)

    def restarts(self) -> int:
        """How often the agent ran --docker-restart."""
        path = self.dir / "restarts.log"
        return path.read_text().count("restart") if path.exists() else 0

    def misbehave(self, how: str) -> None:
        (self.dir / "mode.txt").write_text(how)

    def log(self, lines: int = 15) -> str:
        path = self.dir / "dockerd.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    # the API

    def api(self, method: str, path: str, body: Any = None, timeout: float = SOON, raw: bytes = b"") -> Any:
        with contextlib.closing(_Api(self.dir / "docker.sock", timeout)) as api:
            data = raw or (json.dumps(body).encode() if body is not None else None)
            headers = {"Content-Type": "application/x-tar" if raw else "application/json"} if data else {}
            api.request(method, path, data, headers)
            answer = api.getresponse()
            text = answer.read()
        assert answer.status < 400, f"{method} {path}: {answer.status} {text!r}"
        return json.loads(text) if text.startswith((b"{", b"[")) and path.split("?")[0] != "/images/create" else text

    def bridge(self) -> str:
        return str(self.api("GET", "/networks/bridge")["Options"]["com.docker.network.bridge.name"])

    def on(self, bridge: str) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException, AssertionError, KeyError):
            return self.bridge() == bridge
        return False

    def load(self) -> None:
        """The image `box`: busybox and nothing else."""
        with open(os.path.realpath(BUSYBOX), "rb") as program:
            assert b"/ld-linux" not in program.read(4096), f"{BUSYBOX} is not static: install busybox-static"
        about = io.BytesIO()
        with tarfile.open(fileobj=about, mode="w") as tar:
            tar.add(os.path.realpath(BUSYBOX), "bin/busybox")
            for name in ("ping", "sleep", "sh"):
                link = tarfile.TarInfo(f"bin/{name}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(link)
        self.api("POST", "/images/create?fromSrc=-&repo=box&tag=1", raw=about.getvalue())

    def run(
        self, name: str, policy: str = "no", network: str = "bridge", ports: Mapping[str, int] | None = None
    ) -> str:
        """A container that sleeps, with some of its ports ("80/tcp") published on the host's; its address."""
        bindings = {port: [{"HostPort": str(number)}] for port, number in (ports or {}).items()}
        about = {
            "Image": "box:1",
            "Cmd": ["/bin/sleep", "100000"],
            "StopSignal": "SIGKILL",
            "ExposedPorts": {port: {} for port in bindings},
            "HostConfig": {"RestartPolicy": {"Name": policy}, "NetworkMode": network, "PortBindings": bindings},
        }
        self.api("POST", f"/containers/create?name={name}", about)
        self.api("POST", f"/containers/{name}/start")
        return self.address(name, network=network)

    def run_again(self, name: str) -> str:
        """A new container of that name; "" while Docker can't make one."""
        with contextlib.suppress(OSError, AssertionError, http.client.HTTPException):
            with contextlib.suppress(AssertionError):
                self.remove(name)
            return self.run(name)
        return ""

    def begin(self, name: str) -> str:
        self.api("POST", f"/containers/{name}/start")
        return self.address(name)

    def halt(self, name: str) -> None:
        self.api("POST", f"/containers/{name}/stop?t=0")

    def remove(self, name: str) -> None:
        self.api("DELETE", f"/containers/{name}?force=1&v=1")

    def inspect(self, name: str) -> dict[str, Any]:
        return dict(self.api("GET", f"/containers/{name}/json"))

    def running(self) -> list[str]:
        return sorted(str(c["Names"][0])[1:] for c in self.api("GET", "/containers/json"))

    def address(self, name: str, version: int = 4, network: str = "bridge") -> str:
        # since API 1.52 only the networks have addresses
        settings = self.inspect(name)["NetworkSettings"]["Networks"][network]
        return str(settings["IPAddress" if version == 4 else "GlobalIPv6Address"])

    def ping(self, name: str, address: str, size: int = 56, count: int = 1) -> bool:
        """Whether `count` pings of this many bytes (don't-fragment) from within the container are all answered."""
        pid = self.inspect(name)["State"]["Pid"]
        argv = ["nsenter", f"--net=/proc/{pid}/ns/net", "ping", "-n", "-q", "-c", str(count), "-i", "0.2", "-W", "1"]
        done = subprocess.run(
            [*argv, "-M", "do", "-s", str(size), address], capture_output=True, text=True, timeout=SOON
        )
        return f" {count} received, 0% packet loss" in done.stdout

    def mtu(self, name: str) -> int:
        pid = self.inspect(name)["State"]["Pid"]
        argv = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "-j", "link", "show", "eth0"]
        return int(json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)[0]["mtu"])

    def kill_containers(self) -> None:
        """Those of a daemon that was killed, with its containerd."""
        mine = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and str(self.dir) in " ".join(netns.command_line(int(entry))):
                mine.append(int(entry))
        children = [int(e) for e in os.listdir("/proc") if e.isdigit() and _parent(int(e)) in mine]
        netns.end([p for p in map(netns.identity, {*mine, *children} - {os.getpid()}) if p])
        # where nobody reaps the dead, their numbers are taken for living ones
        (self.dir / "exec/containerd/containerd.pid").unlink(missing_ok=True)

    def end(self) -> None:
        """Nothing is left: containers, the daemon, mounts, files."""
        if self.alive():
            self.clear()
        self.stop()
        self.kill_containers()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if line.split()[1].startswith(f"{self.dir}/"):
                subprocess.run(["umount", "-l", line.split()[1]], check=False)
        shutil.rmtree(self.dir, ignore_errors=True)


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def power_cut(docker: Docker) -> None:
    """Leave of a host what a power cut leaves: files."""
    host = docker.host
    host.stop_agent(signal.SIGKILL)
    if docker.alive():
        docker.stop(signal.SIGKILL)
    docker.kill_containers()
    host.kill_vswitchd()
    host.kill_ovsdb()
    found = [link["ifname"] for link in json.loads(host.run(["ip", "-j", "link"]).stdout)]
    for name in found:
        if name not in ("lo", "eth0"):
            # with one end of a pair the other goes
            host.run(["ip", "link", "del", name], check=False)
    tables = json.loads(host.run(["nft", "-j", "list", "tables"]).stdout)["nftables"]
    for table in [t["table"] for t in tables if "table" in t]:
        if table["name"] != "lab":
            host.run(["nft", "delete", "table", table["family"], table["name"]])
    # it is of one boot, and all hosts of a lab have this machine's
    (host.state / "forwarding.json").unlink(missing_ok=True)


def rules(host: Host) -> str:
    """Both iptables without counters, chains' order included; without the agent's own."""
    texts = [host.run([tool]).stdout for tool in ("iptables-save", "ip6tables-save")]
    text = re.sub(r"(?m)^#.*\n|\[\d+:\d+\]", "", "\n".join(texts))
    return "\n".join(line for line in text.splitlines() if "ovsmesh" not in line)


def links(host: Host) -> dict[str, Any]:
    found = json.loads(host.run(["ip", "-j", "addr", "show"]).stdout)
    return {
        link["ifname"]: (link["mtu"], sorted(a["local"] for a in link["addr_info"] if a["family"] == "inet"))
        for link in found
        if not link["ifname"].startswith(("veth", "vp"))
    }


def until(what: str, check: Any, timeout: float = SOON) -> Any:
    return wait_for(what, check, timeout, every=0.05)
