"""Tell which kind of Docker a host has, and name those that can't be moved to kbr0.

Each refusal is one sentence for the user: what was found, where, and what to do. "" means that nothing is in the way.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ovsmesh.containers import daemon_json
from ovsmesh.errors import OvsmeshError
from ovsmesh.processes import running, shares_network
from ovsmesh.state_dir import read_regular
from ovsmesh.text import listed, printable

_INSTEAD = "use a Docker of the system's packages, or `--docker off`"
_CONFIG = "/etc/docker/daemon.json"
_ROOTLESS_SOCKETS = "/run/user/*/docker.sock"
_SNAP = ("/snap/", "/var/snap/")
_DESKTOP = "com.docker.back"
"""Start of the name of Docker Desktop's own process, as the kernel cuts it."""


class Process(NamedTuple):
    """A process of a Docker that this one can see."""

    pid: int
    uid: int
    here: bool
    """Whether it is in this network namespace."""
    argv: tuple[str, ...]


def remote(environment: Mapping[str, str], socket: str) -> str:
    """Return why the Docker that the user's commands reach is another one than that of `socket`."""
    host, context = environment.get("DOCKER_HOST", ""), environment.get("DOCKER_CONTEXT", "")
    shown = printable(host or context, 100)
    if host.startswith("unix://"):
        path = host.removeprefix("unix://")
        if os.path.realpath(path) == os.path.realpath(socket):
            return ""
        return f"DOCKER_HOST is {shown}, and --docker-socket is {socket}: unset DOCKER_HOST, or give both the same one"
    if not host and context in ("", "default"):
        return ""
    name = "DOCKER_HOST" if host else "DOCKER_CONTEXT"
    return (
        f"{name} is {shown}, so `docker` speaks to a remote Docker from here, and ovsmesh moves only the one behind "
        f"{socket}: unset {name} if that is the one, else run ovsmesh on that host"
    )


def of_daemon(about: Mapping[str, Any], version: Mapping[str, Any], process: Process | None, uid: int) -> str:
    """Return why a daemon that answers can't be moved. `about`, `version`: its answers; `uid`: of who listens."""
    parts = version.get("Components")
    names = [str(p.get("Name")) for p in parts if isinstance(p, dict)] if isinstance(parts, list) else []
    root, options = str(about.get("DockerRootDir") or ""), about.get("SecurityOptions")
    swarm = about.get("Swarm")
    joined = str(swarm.get("LocalNodeState") or "inactive") if isinstance(swarm, dict) else "inactive"
    if any("podman" in name.lower() for name in names):
        return _podman("the daemon that answers")
    if about.get("Name") == "docker-desktop" or "Docker Desktop" in str(about.get("OperatingSystem")):
        return _desktop()
    if uid > 0 or (isinstance(options, list) and any("rootless" in str(option) for option in options)):
        return _rootless(f"runs as uid {uid}" if uid > 0 else "says so itself")
    if root.startswith(_SNAP) or _from_snap(process):
        return _snap()
    if process is not None and not process.here:
        return (
            f"dockerd (pid {process.pid}) is in another network namespace than ovsmesh, as in a container of its own: "
            f"its containers can't be plugged into this host's kbr0; {_INSTEAD}"
        )
    if joined != "inactive":
        return (
            f"this Docker is a Swarm node ({printable(joined, 20)}): a restart would move its services' tasks to other "
            "nodes, and its networks do not use the default bridge. `docker swarm leave` first, or `--docker off`"
        )
    return ""


def of_pods(running: tuple[str, ...]) -> str:
    """Return why a daemon can't be moved that runs the pods of a kubelet."""
    pods = [name for name in running if name.startswith("k8s_POD_")]
    if not pods:
        return ""
    return (
        f"this Docker runs Kubernetes pods ({listed(pods, 3)}), which are plugged in by CNI and not by Docker, and "
        "which a restart would stop: use `--docker off` and `--cni-dir`"
    )


def of_host(socket: str, config: str = _CONFIG) -> str:
    """Return which other kind of Docker a host has where none answers at `socket`."""
    real = os.path.realpath(socket)
    if "podman" in real:
        return _podman(real)
    found = list(processes())
    own = [one for one in found if one.here and one.uid == 0]
    for one in own:
        hosts = _hosts(one.argv, config)
        unix = [host.removeprefix("unix://") for host in hosts if host.startswith("unix://")]
        if not hosts or "fd" in {host.partition("://")[0] for host in hosts} or socket in unix:
            return ""
        text = f"dockerd (pid {one.pid}) listens on {listed(hosts, 3)} and not on {socket}"
        if unix:
            return f"{text}: give --docker-socket {unix[0]}"
        return f"{text}: ovsmesh needs a unix socket; add `-H unix://{socket}` to its command line or `hosts`"
    if other := next((one for one in found if one.uid), None):
        return _rootless(f"pid {other.pid} runs as uid {other.uid}")
    if sockets := glob.glob(_ROOTLESS_SOCKETS):
        return _rootless(f"{sockets[0]} is there, and nothing answers at {socket}")
    if any(_from_snap(one) for one in found) or (
        os.path.isdir("/snap/docker") and not os.path.exists("/usr/bin/dockerd")
    ):
        return _snap()
    return _desktop() if any(running((_DESKTOP,), here=False)) else ""


def processes() -> Iterator[Process]:
    """Return every dockerd that is seen."""
    return (one for pid, _ in running(("dockerd",), here=False) if (one := process(pid)))


def process(pid: int) -> Process | None:
    """Return one process; None if it has ended or can't be seen."""
    with contextlib.suppress(OSError):
        folder = Path("/proc", str(pid))
        here = shares_network(pid)
        words = (folder / "cmdline").read_bytes()[: 1 << 16].split(b"\0")
        argv = tuple(word.decode(errors="replace") for word in words if word)
        return Process(pid, folder.stat().st_uid, here, argv)
    return None


def _from_snap(one: Process | None) -> bool:
    return one is not None and any(part in word for word in one.argv for part in _SNAP)


def _hosts(argv: tuple[str, ...], config: str) -> list[str]:
    """Return where a dockerd listens, by its command line and its file; [] for its default."""
    found, words = [], list(argv[1:])
    while words:
        word, _, text = words.pop(0).partition("=")
        if word in ("-H", "--host"):
            found.append(text or (words.pop(0) if words else ""))
        elif word.startswith("-H"):
            found.append(word[2:])
        elif word == "--config-file":
            config = text or (words.pop(0) if words else config)
    with contextlib.suppress(OSError, OvsmeshError, json.JSONDecodeError):
        listens = daemon_json.settings(read_regular(config)[0]).get("hosts")
        found += [str(host) for host in listens] if isinstance(listens, list) else []
    return [printable(host if "://" in host else f"tcp://{host}", 100) for host in found if host]


def _podman(what: str) -> str:
    return (
        f"{what} is podman's and no Docker: its containers are in networks of podman's own, which daemon.json does not "
        "change; use `--docker off`"
    )


def _rootless(why: str) -> str:
    return (
        f"the Docker here is rootless ({why}): its containers are in a network namespace of that user, which can't be "
        f"plugged into kbr0; {_INSTEAD}"
    )


def _snap() -> str:
    return (
        "the Docker here is the snap's, which has its own daemon.json, unit and confinement: install Docker from the "
        "system's packages (docker.io or docker-ce), or use `--docker off`"
    )


def _desktop() -> str:
    return (
        "the Docker here is Docker Desktop's, which runs in a virtual machine of its own: its containers can't be "
        f"plugged into this host's kbr0; {_INSTEAD}"
    )
