"""What is known of a lab outside any process: its settings on disk, its lock, the names of its namespaces.

Also what a lab needs of the machine, and which settings it can have.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ovsmesh.lab import netns
from ovsmesh.lab.netns import LabError, Process
from ovsmesh.names import API_VERSION, DEFAULT_MESH, MESH
from ovsmesh.state_dir import write_atomic

BASE = Path("/run/ovsmesh-lab")
MOST_HOSTS = 20
"""40 hosts overflow the kernel's machine-wide neighbour table (gc_thresh3 = 1024)."""
MOST_PODS = 50
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?")
_SOCKET_PATH = 107
"""Bytes that fit a unix socket's address, less the terminating zero."""
_TOOLS = {"ip": "iproute2", "ovs-vswitchd": "openvswitch-switch", "ovsdb-server": "openvswitch-switch"}
Step = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class LabSettings:
    """The settings of a lab, kept in its state directory as lab.json."""

    name: str
    hosts: tuple[int, ...]
    pods: int = 1
    dual_stack: bool = False
    underlay6: bool = False
    encapsulation: str = "gre"
    key: int | None = None
    underlay_mtu: int = 1500
    datapath: str = "netdev"
    owner: Process | None = None
    """The process that made the lab for itself: once it has ended, the lab may be ended. None for other labs."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What `Lab.down()` ended, and what it found left afterwards."""

    name: str
    processes: int
    namespaces: int
    left: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is left."""
        return not self.left

    def __str__(self) -> str:
        ended = f"lab {self.name}: ended {self.processes} processes, removed {self.namespaces} namespaces"
        return f"{ended}\n  left: {', '.join(self.left) or '0 processes, 0 namespaces, 0 files'}"


def quiet(_: str) -> AbstractContextManager[Any]:
    """Show no steps."""
    return nullcontext()


def kernel_datapath() -> bool:
    """Return whether this machine's kernel has openvswitch. Loads it if it is a module."""
    if shutil.which("modprobe"):
        netns.run(["modprobe", "-qa", "openvswitch", "vport-gre", "vport-vxlan", "vport-geneve"], check=False)
    return Path("/sys/module/openvswitch").exists()


def preflight(datapath: str) -> None:
    """Raise LabError when this machine or user cannot make a lab. Names what is missing."""
    if os.geteuid() != 0:
        raise LabError("a lab makes network namespaces, which needs root; run it with sudo")
    tools = _TOOLS if datapath == "system" else {**_TOOLS, "nft": "nftables"}
    missing = {tool: package for tool, package in tools.items() if not shutil.which(tool)}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise LabError(f"not found: {', '.join(missing)}; install with: apt-get install {packages}")


def check(settings: LabSettings, base: Path) -> None:
    """Raise LabError for settings that no lab can have."""
    if not 1 <= len(settings.hosts) <= MOST_HOSTS:
        text = f"{len(settings.hosts)} hosts: a lab has 2 to {MOST_HOSTS}"
        raise LabError(f"{text} (more overflow the kernel's neighbour table, which all namespaces share)")
    if not 0 <= settings.pods <= MOST_PODS:
        raise LabError(f"{settings.pods} pods a host: a lab has 0 to {MOST_PODS}")
    if not NAME.fullmatch(settings.name):
        raise LabError(f"name {settings.name!r}: wanted at most 20 of a-z, 0-9 and '-', with no '-' at either end")
    longest = f"{base / settings.name}/h{MOST_HOSTS}/ovs-vswitchd.4194304.ctl"
    if len(longest.encode()) > _SOCKET_PATH:
        raise LabError(f"state directory {base / settings.name}: too long for a unix socket in it; use a shorter one")


def load(base: Path, name: str) -> LabSettings:
    """Return the settings of a lab. Raises LabError when there is no such lab."""
    try:
        raw = json.loads((base / name / "lab.json").read_text())
    except FileNotFoundError as error:
        known = ", ".join(names(base)) or "none"
        raise LabError(f"lab {name}: not there (looked in {base}; labs there: {known}); `ovsmesh lab up`") from error
    raw["hosts"] = tuple(raw["hosts"])
    raw["owner"] = Process(*raw["owner"]) if raw["owner"] else None
    return LabSettings(**raw)


def save(base: Path, settings: LabSettings) -> None:
    """Write the settings where `load` finds them."""
    write(base / settings.name / "lab.json", json.dumps(asdict(settings), indent=1))


def mesh_text(settings: LabSettings, nodes: Sequence[Mapping[str, Any]], spec: Mapping[str, Any]) -> str:
    """Return a mesh file with these nodes; `spec` overrides or adds."""
    import yaml

    cidrs = ["10.97.0.0/16", *(["fd00:97::/32"] if settings.dual_stack else [])]
    content: dict[str, Any] = {"clusterCIDRs": cidrs, "encapsulation": settings.encapsulation}
    content |= {} if settings.key is None else {"key": settings.key}
    content |= {**spec, "nodes": [dict(node) for node in nodes]}
    head = {"apiVersion": API_VERSION, "kind": MESH, "metadata": {"name": DEFAULT_MESH}}
    return str(yaml.safe_dump({**head, "spec": content}, sort_keys=False))


def names(base: Path = BASE) -> list[str]:
    """Return the names of the labs, by their state directories."""
    return sorted(path.parent.name for path in base.glob("*/lab.json")) if base.exists() else []


@contextmanager
def locked(base: Path, name: str, create: bool = False) -> Iterator[None]:
    """Hold the lock with which one process at a time changes a lab. It ends with its holder, however that ends.

    Raises LabError when another process holds it for more than 15 s.
    """
    state = base / name
    if create:
        state.mkdir(parents=True, exist_ok=True)
    try:
        fd = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield
        return
    try:
        hint = "another process is making or ending it"
        netns.wait_for(f"the lock of lab {name}", lambda: _try_lock(fd), timeout=15, every=0.1, hint=hint)
        yield
    finally:
        os.close(fd)


def left_of(base: Path, name: str) -> tuple[str, ...]:
    """Return what there is of a lab: namespaces, processes that name its state directory, the directory itself."""
    state = f"{base / name}/"
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]
    users = [pid for pid in pids if any(state in argument for argument in netns.command_line(pid))]
    left = [f"namespace {ns}" for ns in sorted(own(name))]
    left += [f"process {pid} ({' '.join(netns.command_line(pid))[:60]})" for pid in users]
    return (*left, *([f"directory {state}"] if Path(state).exists() else []))


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def own(name: str) -> set[str]:
    """Return the namespaces of a lab, by their names."""
    return {ns for ns in netns.namespaces() if re.fullmatch(rf"{name}-(hub|h\d+(p\d+)?)", ns)}


def write(path: Path, text: str) -> None:
    """Write a file by an atomic rename."""
    write_atomic(path, text, 0o644, sync=False)
