"""Read a Docker daemon through its API. A thread follows the daemon and hands over immutable snapshots.

So a daemon that hangs or restarts never delays the loop.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ovsmesh.containers import docker_kind
from ovsmesh.dataplane.types import Daemon
from ovsmesh.file_watch import FileWatch
from ovsmesh.wakeup import Wakeup

_ANSWER = 20.0
"""Seconds for one answer of a daemon that is up."""
_QUESTION = 3.0
"""Seconds for one answer that somebody waits for at a terminal."""
_START = 120.0
"""Seconds that a daemon may take to answer: it listens long before it is ready."""
_SOON = 0.5
_PAUSE = (0.05, 5.0)
_LATE = 30.0
"""Seconds between looks for an absent socket, in case a notification is lost."""
_DORMANT_POLL = 1.0
_COALESCE = 0.1
_MOST = 4 << 20
"""Bytes of one answer."""
_EVENTS = {"type": ["container", "daemon"], "event": ["start", "die", "reload"]}
_INSPECTED = 50
"""Most containers whose restart policy is read."""
_NAME = re.compile(r"[^\w.-]")
_VERSION = re.compile(r"[^\w.+~:-]")
"""Debian's are as 26.1.5+dfsg1."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("docker", timeout=_ANSWER)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class DaemonWatch:
    """An event source: the daemon behind a socket. `daemon` is None until the first look."""

    def __init__(self, path: str, off: Callable[[], str] = lambda: "") -> None:
        """Watch the daemon behind `path`. `off` returns what says that one is off on purpose, and may take a while."""
        self._path, self._off = path, off
        self._down_as: tuple[str, str, str] = ("", "", "")
        self._down_at = 0.0
        self.daemon: Daemon | None = None
        self._news, self._poke = Wakeup(), Wakeup()
        self._file = FileWatch(path)
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="docker", daemon=True)
        self._thread.start()

    def fds(self) -> list[int]:
        """Return the file descriptors that are readable when there is a new snapshot."""
        return [self._news.fd]

    def drain(self) -> bool:
        """Return whether there is a new snapshot."""
        return self._news.clear()

    def poke(self) -> None:
        """Have the daemon read again now; the next snapshot has a later read_at."""
        self._poke.wake()

    def close(self) -> None:
        """End the thread, within two seconds unless it waits for an answer."""
        self._ending = True
        self.poke()
        self._thread.join(_SOON * 4)
        if self._thread.is_alive():
            return  # it waits for an answer, and ends with the process
        self._file.close()
        self._news.close()
        self._poke.close()

    # the thread

    def _over(self) -> bool:
        return self._ending

    def _run(self) -> None:
        pause = _PAUSE[0]
        while not self._over():
            started = time.monotonic()
            dormant = False
            try:
                dormant = _dormant(self._path)
                if dormant:
                    self._down("systemd holds its socket, and no dockerd runs", started)
                else:
                    self._follow(started)
            except FileNotFoundError:
                self._down(f"there is no socket {self._path}", started)
                pause = _LATE
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                self._down(f"{self._path}: {text or 'closed'}", started)
                if time.monotonic() - started > _SOON:
                    pause = _PAUSE[0]
            if self._over():
                return
            ready, _, _ = select.select([self._poke.fd, *self._file.fds()], [], [], _DORMANT_POLL if dormant else pause)
            self._poke.clear()
            self._file.drain()
            pause = _PAUSE[0] if ready else min(pause * 2, _PAUSE[1])

    def _down(self, why: str, started: float) -> None:
        if self._down_as[0] != why or started - self._down_at > _LATE:
            kind = docker_kind.of_host(self._path)
            self._down_as, self._down_at = (why, kind, "" if kind else self._off()), started
        self._publish(Daemon("down", why, unsuitable=self._down_as[1], off=self._down_as[2], read_at=started))

    def _publish(self, daemon: Daemon) -> None:
        old, self.daemon = self.daemon, daemon
        # a daemon that is up was read after an event or a poke
        if old != daemon or daemon.state == "up":
            self._news.wake()

    def _follow(self, started: float) -> None:
        """Read and publish at every event of the daemon. Raise when the daemon ends."""
        with contextlib.closing(_Connection(self._path)) as events:
            events.connect()
            self._await(events.sock, started)
            what = json.dumps(_EVENTS).replace(" ", "").replace('"', "%22")
            sock = events.sock
            events.request("GET", f"/events?filters={what}")
            # the stream is read from the socket from here on
            stream = events.getresponse()
            while not self._over():
                began = time.monotonic()
                self._publish(_read(self._path, began))
                select.select([sock, self._poke.fd], [], [])
                self._poke.clear()
                if select.select([sock], [], [], 0.0)[0]:
                    # the event itself does not matter: everything is read again
                    if stream.isclosed() or not sock.recv(1 << 16):
                        raise OSError("dockerd has ended")
                    select.select([self._poke.fd], [], [], _COALESCE)

    def _await(self, sock: socket.socket, started: float) -> None:
        """Wait until the daemon answers. Raise OSError."""
        sock.sendall(b"GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n")
        if not select.select([sock], [], [], _SOON)[0]:
            self._publish(Daemon("starting", f"{self._path}: dockerd does not answer yet", read_at=started))
            end = time.monotonic() + _START
            while not select.select([sock], [], [], 0.0)[0]:
                if self._over() or time.monotonic() > end:
                    raise OSError("dockerd does not answer")
                select.select([sock.fileno(), self._poke.fd], [], [], max(0.0, end - time.monotonic()))
                self._poke.clear()
        answer = b""
        while not (body := answer.partition(b"\r\n\r\n")[2]).startswith(b"OK"):
            more = sock.recv(4096) if body in (b"", b"O") else b""
            if not more or len(answer) > 1 << 16:
                raise OSError("the answer is not Docker's")
            answer += more


def _read(path: str, began: float) -> Daemon:
    with contextlib.closing(_Connection(path)) as api:
        api.connect()
        pid, uid, _ = struct.unpack("iII", api.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        info = _get(api, "/info", {})
        about = _get(api, "/version", {})
        bridge = _get(api, "/networks/bridge", {})
        listed = _get(api, "/containers/json", [])
        names, returning = [], []
        for one in listed[:1000] if isinstance(listed, list) else []:
            name = _name(one)
            names.append(name)
            if len(names) <= _INSPECTED:
                about = _get(api, f"/containers/{_NAME.sub('', str(_dict(one).get('Id')))}/json", {})
                policy = _dict(_dict(about.get("HostConfig")).get("RestartPolicy")).get("Name")
                if policy in ("always", "unless-stopped"):
                    returning.append(name)
    options = _dict(bridge.get("Options"))
    ranges = _dict(bridge.get("IPAM")).get("Config")
    configs = [c for c in ranges if isinstance(c, dict)] if isinstance(ranges, list) else []
    found = _process(pid)
    seen = docker_kind.process(found) if found else None
    mtu = str(options.get("com.docker.network.driver.mtu", "0"))
    return Daemon(
        "up",
        version=_VERSION.sub("", str(info.get("ServerVersion") or ""))[:40],
        bridge=_NAME.sub("", str(options.get("com.docker.network.bridge.name") or ("docker0" if bridge else "")))[:15],
        mtu=int(mtu) if mtu.isascii() and mtu.isdigit() and len(mtu) < 6 else 0,
        subnets=tuple(str(c.get("Subnet"))[:64] for c in configs[:8] if c.get("Subnet")),
        ipv6=bridge.get("EnableIPv6") is True,
        live_restore=info.get("LiveRestoreEnabled") is True,
        isolates=options.get("com.docker.network.bridge.enable_icc") == "false",
        running=tuple(sorted(names)),
        returning=tuple(sorted(returning)),
        instance=(found, start_time(found)) if found else (0, 0),
        flags=seen.argv if seen else (),
        unsuitable=docker_kind.of_daemon(info, about, seen, uid) or docker_kind.of_pods(tuple(names)),
        read_at=began,
    )


def container_addresses(path: str, name: str) -> tuple[str, ...] | None:
    """Return the addresses of a running container, by its name or id; None where there is no such container.

    Raises OSError where no daemon answers at the socket `path`.
    """
    api = _Connection(path)
    api.timeout = _QUESTION
    try:
        found = _get(api, f"/containers/{quote(name, safe='')}/json", {})
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{path}: {error}") from None
    finally:
        api.close()
    if not found:
        return None
    networks = _dict(_dict(found.get("NetworkSettings")).get("Networks"))
    addresses = [_dict(n).get(key) for n in networks.values() for key in ("IPAddress", "GlobalIPv6Address")]
    return tuple(str(address) for address in addresses if address)


def _get(api: _Connection, path: str, absent: Any) -> Any:
    """Return the answer, `absent` for a 404. Raise OSError, HTTPException or ValueError."""
    api.request("GET", path)
    answer = api.getresponse()
    data = answer.read(_MOST + 1)
    if len(data) > _MOST:
        raise OSError(f"{path}: more than {_MOST} bytes")
    if answer.status == 404:
        return absent
    if answer.status != 200:
        raise OSError(f"{path}: HTTP status {answer.status}")
    found = json.loads(data)
    if not isinstance(found, type(absent)):
        raise ValueError(f"{path}: a {type(found).__name__} came back")
    return found


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _name(container: Any) -> str:
    names = _dict(container).get("Names")
    name = str(names[0]) if isinstance(names, list) and names else str(_dict(container).get("Id"))[:12]
    return _NAME.sub("", name)[:64]


# processes


def _process(listener: int) -> int:
    """Return the daemon's process: the listener or, if systemd listens for it, the only dockerd; 0 for unknown."""
    with contextlib.suppress(OSError):
        if listener > 1 and Path(f"/proc/{listener}/comm").read_text().strip() == "dockerd":
            return listener
    found = [one.pid for one in docker_kind.processes() if one.here]
    return found[0] if len(found) == 1 else 0


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks after boot; 0 if it has ended."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if words[0] == "Z" else int(words[19])
    return 0


def _dormant(path: str) -> bool:
    """Return whether systemd listens for a dockerd that does not run: a connection would start it."""
    with contextlib.suppress(OSError):
        inodes = set()
        for line in Path("/proc/net/unix").read_text(errors="replace").splitlines():
            words = line.split()
            if len(words) == 8 and os.path.realpath(words[7]) == os.path.realpath(path):
                inodes.add(f"socket:[{words[6]}]")
        if not inodes or any(one.here for one in docker_kind.processes()):
            return False
        for fd in os.listdir("/proc/1/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/1/fd/{fd}") in inodes:
                    return True
    return False
